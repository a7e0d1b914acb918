"""`cdh:` against a server of the shape of Confidential Containers' api-server-rest."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from encfs.errors import KeyFileError, KeyProviderError
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.providers import provider_from_uri
from encfs.keys.providers.cdh import CdhProvider
from encfs.keys.secrets import SymmetricKey
from tests.support.kbs_server import KbsServer, Reply, encoded, serving

DIGEST = "sha256:" + "5a" * 32
KEK = bytes(range(32))
KEK_TEXT = base64.b64encode(KEK).decode()


class Hub(KbsServer):
    """GET /cdh/resource/PATH gives the octets, 404 where the feature is off, 500 with text for a failure."""

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Reply | None:
        self.asked.append(path)
        name = path.removeprefix("/cdh/resource/")
        if method == "GET" and name in self.resources:
            return 200, {}, self.resources[name]
        return (500, {}, b"rpc status: get resource failed") if self.resources else (404, {}, b"")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(), None) as server:
        assert isinstance(server, Hub)
        yield server


def provider(hub: Hub, path: str = "default/key/model") -> CdhProvider:
    found = provider_from_uri(f"cdh:{path}?port={urlsplit(hub.url).port}")
    assert isinstance(found, CdhProvider)
    return found


def opened(provider: CdhProvider) -> bytes:
    keyring = create_keyring(b"secret", DIGEST, [SymmetricKey(bytearray(KEK))])
    return bytes(parse_keyring(keyring, DIGEST).open([provider]))


def test_the_hub_gives_the_key_once(hub: Hub) -> None:
    hub.resources["default/key/model"] = KEK
    one = provider(hub)
    assert opened(one) == opened(one) == b"secret"
    assert hub.asked == ["/cdh/resource/default/key/model"]
    assert one.fetch().kid == "kbs:///default/key/model"


def test_refusals_come_with_it(hub: Hub) -> None:
    hub.resources["default/key/model"] = encoded({"key": KEK_TEXT, "min_version": 7})
    one = provider(hub)
    assert opened(one) == b"secret"
    assert one.binding.min_version == 7


def test_a_feature_that_is_off(hub: Hub) -> None:
    with pytest.raises(KeyProviderError, match="status 404"):
        opened(provider(hub))


def test_a_failure_behind_the_hub(hub: Hub) -> None:
    hub.resources["another/key/model"] = KEK
    with pytest.raises(KeyProviderError, match="status 500"):
        opened(provider(hub))


@pytest.mark.parametrize("content", [b"", KEK[:31], b"{", b"\xff" * 40])
def test_no_key(hub: Hub, content: bytes) -> None:
    hub.resources["default/key/model"] = content
    with pytest.raises(KeyFileError, match="cdh:default/key/model"):
        opened(provider(hub))


def test_no_hub() -> None:
    with serving(Hub(), None) as gone:
        pass
    assert isinstance(gone, Hub)
    with pytest.raises(KeyProviderError, match="gives no answer"):
        opened(provider(gone))


@pytest.mark.parametrize("rest", ["", "a/b", "a/b/..", "a/b/c?port=0", "a/b/c?port=70000", "a/b/c?host=evil"])
def test_malformed_uris(rest: str) -> None:
    with pytest.raises(KeyFileError):
        CdhProvider(rest)
