"""A process that forks: its child leaves alone what belongs to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import trustme

import relstream
from relstream.testing.server import ServerStartFailed, TLSFiles

APPLICATION = Path(__file__).parent / "forking.py"
ROOT = Path(relstream.__file__).parents[1]


async def goes_on(url: str, loop: str, how: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(APPLICATION), url, loop, how),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 40)
    finally:
        with contextlib.suppress(ProcessLookupError):  # its child, too
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    assert (out.decode(), process.returncode) == ("ok\n", 0), err.decode()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("how", ["raises", "uses", "closes"])
async def test_a_child_leaves_its_parents_clients_alone(redis_url, service, loop, how):
    await goes_on(redis_url, loop, how)
    assert (service.entries(), service.locks()) == ([], {})


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_child_says_no_goodbye_over_tls(make_server, tmp_path, loop):
    ca = trustme.CA()
    certificate = ca.issue_cert("127.0.0.1")
    files = TLSFiles(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem")
    ca.cert_pem.write_to_path(files.ca)
    certificate.cert_chain_pems[0].write_to_path(files.cert)
    certificate.private_key_pem.write_to_path(files.key)
    try:
        server = make_server(tls=files)
    except ServerStartFailed as error:
        pytest.skip(f"this server was built without TLS: {error}")
    await goes_on(f"{server.url}?ssl_ca_certs={files.ca}", loop, "closes")
