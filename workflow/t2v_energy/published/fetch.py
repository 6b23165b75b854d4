"""Fetching a published table once, whole and checked, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from t2v_energy.config import PublishedFile
from t2v_energy.errors import UserError
from t2v_energy.published.campaign import Source
from t2v_energy.published.tables import check_sha256, read_cross_model, read_sweeps

ATTEMPTS = 4
TIMEOUT_S = (10, 60)  # to connect; between two pieces
BACKOFF_S = 1.0
BUSY = (429, 500, 502, 503, 504)
READERS = {"cross_model": read_cross_model, "sweeps": read_sweeps}


def fetch(file: PublishedFile, source: Source, out: Path) -> str:
    """Fetch ``file`` to ``out`` and return its SHA-256; ``out`` appears only once it is whole and right.

    Raises:
        UserError: no network, the server refuses, another checksum than the pinned one, or content that is
        not
            the table of ``source``.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.tmp")
    try:
        partial.write_bytes(_content(file.url, source))
        digest = check_sha256(partial, file.sha256)
        READERS[source](partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def _content(url: str, source: Source) -> bytes:
    retry = Retry(
        total=ATTEMPTS - 1, backoff_factor=BACKOFF_S, status_forcelist=BUSY, allowed_methods=("GET",)
    )
    remedy = f"without a network, give your copy: --config published_{source}=FILE"
    with requests.Session() as session:
        session.mount("https://", HTTPAdapter(max_retries=retry))
        try:
            answer = session.get(url, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            raise UserError(f"cannot be fetched ({type(error).__name__})", where=url, remedy=remedy) from None
    if not answer.ok:
        raise UserError(f"the server answers {answer.status_code} {answer.reason}", where=url, remedy=remedy)
    return answer.content
