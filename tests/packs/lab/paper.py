def note(file, line):
    if file:
        with open(file, "a") as notes:
            notes.write(line + "\n")
