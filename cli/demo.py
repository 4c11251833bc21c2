"""`lora-lexicon demo`."""


def demo() -> None: ...
