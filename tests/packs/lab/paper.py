"""What the nodes did, across processes."""


def note(file, line):
    if file:
        with open(file, "a") as notes:
            notes.write(line + "\n")


def times_noted(file, ending):
    with open(file) as notes:
        return sum(line.rstrip("\n").endswith(ending) for line in notes)
