"""Things that a recipe can request but only the command line can allow: running a model's code, and uploads."""

from __future__ import annotations

from dataclasses import dataclass

from lowdft.config.recipe import Recipe
from lowdft.errors import UserError


@dataclass(frozen=True)
class Doors:
    """The flags of a command; all are off by default."""

    trust_remote_code: bool = False
    trust_checkpoint: bool = False
    push_negatives: bool = False

    def check(self, recipe: Recipe) -> None:
        """Raises UserError when the recipe needs a flag that was not given."""
        if recipe.model.trust_remote_code and not self.trust_remote_code:
            raise UserError(
                "model.trust_remote_code is true: this runs Python code that comes with the model. A recipe alone "
                "cannot allow that; add --trust-remote-code to the command if you trust the model's author."
            )

    def arguments(self) -> list[str]:
        """The flags as command-line arguments."""
        return ["--" + name.replace("_", "-") for name, given in vars(self).items() if given]


CLOSED = Doors()
