"""Trained models finetuned for sparsity with the papers' recipe, beside plain finetuning.

v1 (arXiv 2309.03004) offers its modules for training and for finetuning; in v2's recipe (arXiv
2605.25612) JSReLU is mixed in and the norms lifted over the first third of the steps. We found no
size that the abstracts give for finetuning alone, so the bar here is 0: sparser at all. Two models
are finetuned, one trained with weight decay of its norm scales and biases (1-D decay), one without;
each plainly and by the recipe, both with 1-D decay and without, and with a Hoyer penalty as the
strongest simple baseline.

What it cannot tell: what the papers' LoRA of rank 192 does (here all weights are trained), nor what
is gained on a model with GELU, where a swap to any ReLU is most of the effect; these begin with
ReLU.
"""

from __future__ import annotations

from actsparse_lab.papers.questions import SPARED, quality_kept, sparser

RECIPE, PLAIN, HOYER = "paper-finetune", "vanilla", "hoyer-finetune"
FROM_SPARED = "-from-spared"  # ends the names of arms that began from the base without 1-D decay

QUESTIONS = {
    "recipe-inference": sparser(RECIPE, PLAIN),
    "recipe-training": sparser(RECIPE, PLAIN, "training"),
    "recipe-quality": quality_kept(RECIPE, PLAIN),
    "recipe-living": sparser(RECIPE, PLAIN, "living"),
    "recipe-against-spared": sparser(RECIPE, f"{PLAIN}{SPARED}"),
    "from-spared": sparser(f"{RECIPE}{FROM_SPARED}", f"{PLAIN}{FROM_SPARED}"),
    "spared-throughout": sparser(f"{RECIPE}{SPARED}{FROM_SPARED}", f"{PLAIN}{SPARED}{FROM_SPARED}"),
    "against-hoyer": sparser(RECIPE, HOYER),
    "against-hoyer-living": sparser(RECIPE, HOYER, "living"),
    "hoyer-quality": quality_kept(HOYER, PLAIN),
}
