"""Credential providers belong to the event loop of the application that made them."""

from __future__ import annotations

import asyncio

from redis.credentials import CredentialProvider

Given = tuple[str] | tuple[str, str]

# Seconds that a provider may take while its loop is busy, until what it gave before has to do.
PROVIDER_PATIENCE = 1.0


class OnLoop(CredentialProvider):
    """Asks another provider on the loop it belongs to, from the loop of another thread.

    While that loop is blocked what was given last is tried: leases have to outlive that.
    """

    def __init__(self, provider: CredentialProvider, loop: asyncio.AbstractEventLoop) -> None:
        self._provider = provider
        self._loop = loop
        self._last: Given | None = None

    async def get_credentials_async(self) -> Given:
        """What the provider gives; raises what it raises."""
        asking = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._ask(), self._loop))
        try:
            patience = PROVIDER_PATIENCE if self._last is not None else None
            await asyncio.wait({asking}, timeout=patience)
            if not asking.done() and self._last is not None:
                return self._last
        finally:
            asking.cancel()
        self._last = asking.result()
        return self._last

    async def _ask(self) -> Given:
        return await self._provider.get_credentials_async()

    def get_credentials(self) -> Given:
        """For callers that are not asynchronous: there are none here."""
        return self._provider.get_credentials()
