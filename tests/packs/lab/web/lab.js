window.labWasHere = true;
