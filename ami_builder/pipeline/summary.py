"""stub"""


def markdown(n):
    return f"{n}"


def text(n):
    return f"{n.image} {n.ending}"
