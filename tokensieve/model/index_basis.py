"""Linear maps of an attention's queries and keys into the width of an index head, so that few numbers keep its logits.

An index head has one key per token, whose first R dims are rotated. The attention has G keys of width E, of which the
last dims are rotated, in pairs that are complex numbers here. Let q_h, k_g be one pair of frequency f of query head h
and of the group g that it reads. Its part of the logit is Re(conj(q_h) k_g e^(i f (s - t))).

Rotated dims. A rotation commutes with complex factors alone, so a pair of the index key is a complex combination of
keys' pairs of (nearly) its frequency: y = sum_g c_g k_g. The best one is the first principal component of the keys,
each weighted by the power of the queries that read it.

Unrotated dims. They stand for the attention's own unrotated dims, and for what the rotated dims leave out: over the
distances 0 to C of a context, e^(i f d) is in the mean sin(f C) / (f C), which is near 1 for pairs that hardly turn.
The best ones for the squared error of all heads' logits are the first principal components of A_g^(1/2) k_g, where A_g
is the sum of E[q_h q_h^T] over the heads of group g.

Legend: N tokens, H query heads, G key groups, E width of a key, F its rotated pairs, P pairs of an index key (R = 2P),
D width of an index key, U = D - R its unrotated dims.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-6  # eigenvalues below this share of the largest are rounding


@dataclass(frozen=True)
class Layout:
    """Which dims are rotated, how, and how fast.

    nope: the first dims of a key, which the attention does not rotate. frequencies_F, index_frequencies_P: radians per
    token. interleaved, index_interleaved: whether neighbours form a pair (or halves). width: D. gain: the attention's
    factor on rotated logits, divided by the indexer's. longest: tokens of the longest context, C.
    """

    nope: int
    frequencies_F: Tensor
    interleaved: bool
    width: int
    index_frequencies_P: Tensor
    index_interleaved: bool
    gain: float
    longest: int

    @property
    def rope(self) -> int:
        """R."""
        return 2 * len(self.index_frequencies_P)


def as_complex(x: Tensor, interleaved: bool) -> Tensor:
    """The rotated pairs of the last axis, as complex numbers."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    return torch.view_as_complex(pairs.contiguous())


def as_pairs(z: Tensor, interleaved: bool) -> Tensor:
    """The inverse of `as_complex`."""
    pairs = torch.view_as_real(z)
    return (pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2)


class Basis:
    """`keys` and `queries` map into an index head: queries(q)[h] . keys(k) is close to q[h] . k[g(h)], rotated or not.

    Both are linear, so that they map projections (weights) as well as what these project. Dims for which there is
    nothing to keep are zero.
    """

    def __init__(self, q_NHE: Tensor, k_NGE: Tensor, layout: Layout):
        """q, k float32, unrotated; not necessarily of the same tokens."""
        self.layout = layout
        self.repeat = q_NHE.shape[1] // k_NGE.shape[1]
        turn = layout.frequencies_F * layout.longest
        self._still_F = (turn.sin() / turn).clamp_min(0)
        self._mix_pairs(q_NHE, k_NGE)
        self._mix_unrotated(q_NHE, k_NGE)

    def keys(self, k_NGE: Tensor) -> Tensor:
        """(N, D)."""
        y_NP, still_NGE = self._rotated_and_still(k_NGE)
        unrotated_NU = torch.einsum("nge,geu->nu", still_NGE, self._unrotated_keys_GEU)
        return torch.cat((as_pairs(y_NP, self.layout.index_interleaved), unrotated_NU), dim=-1)

    def queries(self, q_NHE: Tensor) -> Tensor:
        """(N, H, D)."""
        nope_NHE, pairs_NHF = self._parts(q_NHE)
        from_pairs_HFP = self._from_key_GFP.conj().repeat_interleave(self.repeat, 0)
        y_NHP = torch.einsum("nhf,hfp->nhp", pairs_NHF, from_pairs_HFP) * self.layout.gain
        still_NHE = self._still(nope_NHE, pairs_NHF)
        unrotated_NHU = torch.einsum(
            "nhe,heu->nhu", still_NHE, self._unrotated_queries_GEU.repeat_interleave(self.repeat, 0)
        )
        return torch.cat((as_pairs(y_NHP, self.layout.index_interleaved), unrotated_NHU), dim=-1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nope = self.layout.nope
        return x[..., :nope], as_complex(x[..., nope:], self.layout.interleaved)

    def _still(self, nope: Tensor, pairs: Tensor) -> Tensor:
        return torch.cat((nope, torch.view_as_real(pairs).flatten(-2)), dim=-1)

    def _rotated_and_still(self, k_NGE: Tensor) -> tuple[Tensor, Tensor]:
        nope, pairs_NGF = self._parts(k_NGE)
        y_NP = torch.einsum("ngf,gfp->np", pairs_NGF, self._to_key_GFP)
        rest_NGF = pairs_NGF - torch.einsum("np,gfp->ngf", y_NP, self._from_key_GFP)
        return y_NP, self._still(nope, rest_NGF * self._still_F)

    def _mix_pairs(self, q_NHE: Tensor, k_NGE: Tensor) -> None:
        """Complex factors (G, F, P): `_to_key` makes y of the keys' pairs, `_from_key` the pairs of y again."""
        pairs_NGF, wanted = self._parts(k_NGE)[1], self.layout.index_frequencies_P
        power_GF = self._parts(q_NHE)[1].abs().square().mean(0).unflatten(0, (-1, self.repeat)).sum(1)
        root_GF = power_GF.clamp_min(SMALLEST * float(power_GF.max())).sqrt()
        nearest_F = (self.layout.frequencies_F.log() - wanted.log()[:, None]).abs().argmin(0)
        shape = (*pairs_NGF.shape[1:], len(wanted))
        self._to_key_GFP, self._from_key_GFP = pairs_NGF.new_zeros(shape), pairs_NGF.new_zeros(shape)
        for p in range(len(wanted)):
            pairs = torch.nonzero(nearest_F == p).flatten()
            if not len(pairs):
                continue
            root_Gf = root_GF[:, pairs]
            weighted = (pairs_NGF[:, :, pairs] * root_Gf).flatten(1)
            first = torch.linalg.eigh((weighted.mH @ weighted).to(torch.complex128)).eigenvectors[:, -1]
            first_Gf = first.to(weighted.dtype).view_as(root_Gf)
            self._to_key_GFP[:, pairs, p] = first_Gf * root_Gf
            self._from_key_GFP[:, pairs, p] = first_Gf.conj() / root_Gf

    def _mix_unrotated(self, q_NHE: Tensor, k_NGE: Tensor) -> None:
        """Factors (G, E, U) of keys, and of the queries of each group's heads."""
        q_NHE = self._still(*self._parts(q_NHE))
        q_NGhE = q_NHE.unflatten(1, (-1, self.repeat))
        power_GEE = torch.einsum("nghe,nghf->gef", q_NGhE, q_NGhE).double() / len(q_NHE)
        values_GE, vectors_GEE = torch.linalg.eigh(power_GEE)
        kept_GE = values_GE > SMALLEST * values_GE.max()
        root_GE = values_GE.clamp_min(0).sqrt() * kept_GE
        inverse_GE = torch.where(kept_GE, 1 / root_GE.clamp_min(1e-30), 0)
        root_GEE, inverse_GEE = (
            ((vectors_GEE * x[:, None]) @ vectors_GEE.mT).to(k_NGE.dtype) for x in (root_GE, inverse_GE)
        )
        still_NGE = self._rotated_and_still(k_NGE)[1]
        weighted = torch.einsum("nge,gef->ngf", still_NGE - still_NGE.mean(0), root_GEE).flatten(1)
        values, vectors = torch.linalg.eigh((weighted.T @ weighted).double())
        unrotated = self.layout.width - self.layout.rope
        best = vectors.flip(1)[:, :unrotated] * (values.flip(0)[:unrotated] > SMALLEST * values.max())
        best = torch.nn.functional.pad(best, (0, unrotated - best.shape[1]))
        best_GEU = best.to(k_NGE.dtype).unflatten(0, still_NGE.shape[1:])
        self._unrotated_keys_GEU, self._unrotated_queries_GEU = root_GEE @ best_GEU, inverse_GEE @ best_GEU
