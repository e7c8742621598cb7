"""What the programs share: telling what they see."""


def seen(what, value):
    print(f'{what}: {value}', flush=True)
