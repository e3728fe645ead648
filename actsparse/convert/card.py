"""The model card of a converted checkpoint: what it costs, what it spares, how to load it."""

from __future__ import annotations

from typing import Any

from actsparse.convert.pipeline import Conversion

_EXCESS = {False: "excess nats a token", True: "cosine distance"}


def rows_of(conversion: Conversion) -> list[dict[str, str]]:
    """The judgements as rows of text, a column each.

    Args:
        conversion: what :func:`actsparse.convert.convert` returned.

    Returns:
        One row for each text.
    """
    return [judged_row(each.to_json()) for each in conversion.judgements]


def judged_row(judgement: dict[str, Any]) -> dict[str, str]:
    """One judgement, as :meth:`Judgement.to_json` gives it, as a row of text.

    Args:
        judgement: the plain values.

    Returns:
        Cells by column.
    """
    row = {
        "text": judgement["text"],
        "documents": str(judgement["documents"]),
        "tokens": f"{judgement['tokens']:,}",
    }
    encodes = judgement.get("pooling") is not None
    if not encodes:
        row["perplexity"] = f"{judgement['perplexity']:.2f}"
    if judgement["excess"] is not None:
        excess = _EXCESS[encodes]
        row[excess] = f"{judgement['excess']:+.4f}"
        if judgement["interval"] is not None:
            low, high = judgement["interval"]
            row[excess] += f" [{low:+.4f}, {high:+.4f}]"
        same = "same nearest neighbour" if encodes else "same best token"
        row[same] = f"{judgement['agreement']:.1%}"
    row["active units"] = f"{judgement['density']:.1%}"
    row["MLP bytes read"] = f"{judgement['bytes_read']:.1%}"
    return row


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows as a table of Markdown.

    Args:
        rows: cells by column, the same columns each.

    Returns:
        The table.

    >>> print(markdown([{"a": "1"}]))
    | a |
    | --- |
    | 1 |
    """
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def card_of(conversion: Conversion, source: str) -> str:
    """The text of the card.

    Args:
        conversion: what :func:`actsparse.convert.convert` returned.
        source: the name of the checkpoint it was made of.

    Returns:
        Markdown.
    """
    encodes = conversion.pooling is not None
    learnt = "embeddings" if encodes else "logits"
    excess, budget = _EXCESS[encodes], f"{conversion.budget:.1%} of perplexity"
    if encodes:
        budget = f"a mean cosine distance of {conversion.budget:g} to the dense model's embeddings"
    gate, product = "the gate's output |φ(z)|", "the product |φ(z)·u|"
    where = {"gate": gate, "product": product, "both": f"{gate} or {product}"}[conversion.form]
    trained = f"{conversion.trained:,} tokens" if conversion.trained else "no training"
    points = [
        {"share dropped": f"{share:.1%}", excess: f"{loss - choice.dense:+.4f}"}
        for choice in [conversion.choice]
        for share, loss in choice.seen
    ]
    kind = "It speaks of new documents of that kind."
    if conversion.pieces:
        kind = (
            "The text had fewer than ten documents, so windows of them stand for documents: it "
            "speaks of other windows of these documents."
        )
    left = "".join(f"\nBlocks left as they were: {each}.\n" for each in conversion.left_out)
    return f"""---
library_name: actsparse
---

# {source}, with thresholds on its MLP activations

Made by `actsparse convert`. In each MLP a unit is set to zero for a token where {where} is
not above the unit's threshold. Distillation on the dense model's {learnt}: {trained}. The budget
was {budget}.

{markdown(rows_of(conversion))}

The certificate, on the test text: {conversion.certificate}. {kind}
{left}
Shares of activations looked at on validation text:

{markdown(points)}

```python
import actsparse

model = actsparse.load("FOLDER")  # the folder of this card
actsparse.accelerate(model)
```

Other loaders refuse this checkpoint: without its thresholds it would be another model.
"""
