"""Ports: what the core asks of engines, rewriters, storage and streams.

Every port has a real implementation and a deterministic fake that ships; both pass one contract
suite. Adapters translate foreign errors into :mod:`mora_serve.errors` before they reach a port.

Who implements what::

    Generator   actors.vllm_engine, mora_serve.fakes   Scorer      actors.scoring, mora_serve.fakes
    Rewriter    mora_serve.rewriting                   Store       mora_serve.store.redis_store
    BlobStore   mora_serve.store.blobs                 PairStream  mora_serve.store.pair_stream
"""

from __future__ import annotations

from mora_serve.ports.engines import (
    Candidate,
    CompletionDelta,
    Generator,
    RewriteContext,
    Rewriter,
    Scorer,
)
from mora_serve.ports.storage import (
    BatchStore,
    BlobStore,
    JobStore,
    Lease,
    PairStream,
    RowCommit,
    UploadState,
    ValidationClaim,
)

__all__ = [
    "BatchStore",
    "BlobStore",
    "Candidate",
    "CompletionDelta",
    "Generator",
    "JobStore",
    "Lease",
    "PairStream",
    "RewriteContext",
    "Rewriter",
    "RowCommit",
    "Scorer",
    "UploadState",
    "ValidationClaim",
]
