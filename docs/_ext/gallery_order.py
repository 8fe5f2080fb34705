"""The order of the scripts in the gallery: learning first, then solvers."""

__all__ = ["Order"]

SCRIPTS = (
    *("learn_flowdiff", "learn_em", "learn_ambient", "learn_sure", "learn_ambientflow"),
    *("optimization", "sampling", "guidance", "projection", "annealing", "particles", "phase"),
)


class Order:
    """Sort key of a file in the gallery; a script that is not in the list raises an error."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, file: str) -> int:
        """Return the place of a script, such as plot_phase.py."""
        return SCRIPTS.index(file.removeprefix("plot_").removesuffix(".py"))

    def __repr__(self) -> str:
        """Return a text that does not change between builds."""
        return "Order"
