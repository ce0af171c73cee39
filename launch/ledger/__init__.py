"""The memory ledger: bytes of every rank class over the simulated timeline, and the choices that make them fit."""
