"""Sparse training, stage 2: selection is on and everything trains.

The model learns on the language-modelling loss, the indexers on equation (4). Without selection the same command trains
the dense model on the same tokens, for comparison; then no indexer gets a gradient.
"""

from tokensieve.train.stage import Stage, language_losses

STAGE = Stage(
    objective=lambda config: "adapt" if config.selection else "none",
    learners=lambda config: "all" if config.selection else "trunk",
    losses=language_losses,
)
