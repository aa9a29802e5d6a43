"""Twin of ffprune.models.curvature: one window at a time, the gradient at every token of every unit by name."""

from __future__ import annotations

import torch
from torch import Tensor

from ffprune.models.view import ModelView


def fisher_traces(view: ModelView, windows: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """``[units, windows]``: sum over tokens of ||d(sum_t -log p(y_t)) / d(output at that token)||^2 per scored token.

    Labels are drawn as the fast routine draws them: by multinomial from the softmax, batch by batch.
    """
    n, seqlen = windows.shape
    vocabulary = view.model.get_input_embeddings().num_embeddings
    labels = []
    for batch in windows.split(batch_size):
        with torch.no_grad():
            shares = view.model(batch, use_cache=False).logits[:, :-1].float().softmax(-1)
        drawn = torch.multinomial(shares.reshape(-1, vocabulary), 1, generator=generator)
        labels.append(drawn.view(len(batch), seqlen - 1))
    drawn = torch.cat(labels)
    result = torch.zeros(len(view.units), n, dtype=torch.float64)
    for i in range(len(view.units)):
        last = view.unit_linears(i).last
        for w in range(n):
            # An offset added to the unit's output: the gradient in it is the gradient in the output.
            offset = torch.zeros(seqlen, last.out_features, requires_grad=True)
            hook = last.register_forward_hook(lambda _m, _i, out, o=offset: out + o.view(out.shape))
            logits = view.model(windows[w : w + 1], use_cache=False).logits[0]
            hook.remove()
            loss = torch.zeros(())
            for t in range(seqlen - 1):
                loss = loss - torch.log_softmax(logits[t].float(), -1)[drawn[w, t]]
            (gradient,) = torch.autograd.grad(loss, offset)
            result[i, w] = sum(float(row.double().square().sum()) for row in gradient) / (seqlen - 1)
    return result
