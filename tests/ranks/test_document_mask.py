"""A token attends only to its document: the logits of each document are those of it alone."""

from itertools import pairwise

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import ARCHS, BY_NAME, SEQUENCE_LENGTH, make_samples

from minitron_mp.config.recipe import make_recipe
from minitron_mp.errors import InputError

ENDS = [[9, 16], [24], [1, 3, 23], [5, 12]]
"""Positions after the documents of each sample. The last document ends with the sample."""


@pytest.mark.parametrize("name", ["one", "tp2-sp", "pp2-vpp2", "cp2", "tp2-cp2-sp", "pp2-cp2"])
def test_documents_are_independent_in_every_layout(ranks, results, name):
    arch, layout = ARCHS["qwen3"], BY_NAME[name]
    samples = make_samples(arch, 0, 4)
    documents = torch.zeros(4, SEQUENCE_LENGTH, dtype=torch.long)
    expected = []
    for sample, ends in enumerate(ENDS):
        bounds = sorted({0, *ends, SEQUENCE_LENGTH})
        for end in bounds[1:-1]:
            documents[sample, end:] += 1
        pieces = [samples["tokens"][sample : sample + 1, a:b] for a, b in pairwise(bounds)]
        weights = results.weights("qwen3")
        expected.append(
            torch.cat([reference.logits(arch, weights, piece)[0, :, : arch.vocab_size] for piece in pieces])
        )
    logits = torch.stack(expected)
    losses = F.cross_entropy(logits.flatten(0, 1), samples["labels"].flatten(), reduction="none")
    loss = (losses * samples["loss_mask"].flatten()).sum() / samples["loss_mask"].sum()
    found = ranks(
        layout.ranks,
        "document_mask_workers.outputs",
        layout=layout,
        arch=arch,
        teacher=results.teacher("qwen3"),
        samples={**samples, "documents": documents},
    )
    whole = reference.logits(arch, results.weights("qwen3"), samples["tokens"])[..., : arch.vocab_size]
    assert not torch.allclose(whole[0], logits[0], atol=1e-2)
    for rank_logits, rank_loss in found:
        if rank_logits is not None:
            found_logits = rank_logits[..., : arch.vocab_size].double()
            torch.testing.assert_close(found_logits, logits, rtol=0, atol=1e-4)
        assert rank_loss == pytest.approx(loss.item(), rel=1e-5)


def test_engine_layers_are_rejected():
    """They need packed sequences, whose documents divide by twice the context parallel size."""
    values = {"model": "m", "output": "o", "data": {"document_mask": True}}
    with pytest.raises(InputError, match="document_mask needs the local layers, transformer_impl is auto"):
        make_recipe(values)
    assert make_recipe({**values, "transformer_impl": "local"}).data.document_mask
