"""Update kinds: one small class each, with its formula and source."""

from __future__ import annotations

from typing import Any

from loramerge.adapters.kinds.affine import EntrywiseAffine
from loramerge.adapters.kinds.block_diagonal import BlockDiagonalPair
from loramerge.adapters.kinds.bounded import BoundedPair
from loramerge.adapters.kinds.butterfly import InputButterfly
from loramerge.adapters.kinds.circulant import CirculantBlocks, GranularPair
from loramerge.adapters.kinds.decompositions import (
    JointDecomposition,
    SingularTail,
    SubspaceInjection,
    TruncatedPair,
)
from loramerge.adapters.kinds.differences import Difference, Replacement
from loramerge.adapters.kinds.glora import WeightMap
from loramerge.adapters.kinds.hadamard import Hadamard
from loramerge.adapters.kinds.householder import Reflections
from loramerge.adapters.kinds.ia3_signed import SignedScaling
from loramerge.adapters.kinds.input_rotation import InputRotation
from loramerge.adapters.kinds.kronecker import Kronecker
from loramerge.adapters.kinds.lowrank import LowRankPair
from loramerge.adapters.kinds.modulation import Modulation
from loramerge.adapters.kinds.network import WeightNetwork
from loramerge.adapters.kinds.pair_rotation import PairRotation
from loramerge.adapters.kinds.principal import PrincipalRotation
from loramerge.adapters.kinds.projected_core import ProjectedCore
from loramerge.adapters.kinds.repeated_block import RepeatedBlock
from loramerge.adapters.kinds.rotations import OutputRotation
from loramerge.adapters.kinds.scaling import ChannelScaling
from loramerge.adapters.kinds.shared_projection import RandomBases, SharedProjection
from loramerge.adapters.kinds.singular import SingularPair
from loramerge.adapters.kinds.sparse import SparseEntries
from loramerge.adapters.kinds.spectrum import FourierSpectrum, WaveletSpectrum
from loramerge.adapters.kinds.tucker import Tucker
from loramerge.adapters.kinds.vector_bank import IndexedPair, VectorBank

KINDS: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (
        Difference,
        Hadamard,
        Kronecker,
        LowRankPair,
        OutputRotation,
        Replacement,
        SignedScaling,
        Tucker,
        CirculantBlocks,
        EntrywiseAffine,
        FourierSpectrum,
        GranularPair,
        IndexedPair,
        JointDecomposition,
        ProjectedCore,
        RandomBases,
        SharedProjection,
        SingularTail,
        SparseEntries,
        SubspaceInjection,
        TruncatedPair,
        VectorBank,
        WaveletSpectrum,
        WeightNetwork,
        WeightMap,
        SingularPair,
        ChannelScaling,
        RepeatedBlock,
        PrincipalRotation,
        PairRotation,
        Modulation,
        InputRotation,
        Reflections,
        InputButterfly,
        BoundedPair,
        BlockDiagonalPair,
    )
}
"""Every kind by its name in `formats/adapters/*.toml`."""
