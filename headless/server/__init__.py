"""The embedded host: ComfyUI's frontend and API format over HTTP, with our own executor behind them."""
