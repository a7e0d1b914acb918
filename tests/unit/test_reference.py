"""References: every form skopeo writes comes apart correctly and goes back to text; everything else is a UsageError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encfs.errors import UsageError
from encfs.oci.reference import Reference, parse_reference

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci:/srv/models", Reference("oci", path="/srv/models")),
        ("oci:models:v1", Reference("oci", path="models", tag="v1")),
        ("oci:models:team/llama:v1.2", Reference("oci", path="models", tag="team/llama:v1.2")),
        (f"oci:models@{DIGEST}", Reference("oci", path="models", digest=DIGEST)),
        (f"oci:models:v1@{DIGEST}", Reference("oci", path="models", tag="v1", digest=DIGEST)),
        ("oci:/home/me@host/models:v1", Reference("oci", path="/home/me@host/models", tag="v1")),
        ("oci:with space:v1", Reference("oci", path="with space", tag="v1")),
        ("docker://reg.example/a/b:v1", Reference("docker", registry="reg.example", repository="a/b", tag="v1")),
        ("docker://localhost/a", Reference("docker", registry="localhost", repository="a")),
        ("docker://reg:5000/a", Reference("docker", registry="reg:5000", repository="a")),
        ("docker://[::1]:5000/a:x", Reference("docker", registry="[::1]:5000", repository="a", tag="x")),
        (f"docker://r.io/a@{DIGEST}", Reference("docker", registry="r.io", repository="a", digest=DIGEST)),
        (f"docker://r.io/a:t@{DIGEST}", Reference("docker", registry="r.io", repository="a", tag="t", digest=DIGEST)),
        ("docker-archive:img.tar", Reference("docker-archive", path="img.tar")),
        ("models", Reference("path", path="models")),
        ("./dir:with-colon", Reference("path", path="./dir:with-colon")),
        ("/srv/a b\u00e9", Reference("path", path="/srv/a b\u00e9")),
    ],
)
def test_forms(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("docker://busybox", "docker://docker.io/library/busybox"),
        ("docker://team/app:v1", "docker://docker.io/team/app:v1"),
        ("docker://docker.io/busybox:1", "docker://docker.io/library/busybox:1"),
    ],
)
def test_docker_hub_short_names(text: str, full: str) -> None:
    assert str(parse_reference(text)) == full


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\0b",
        "x" * 5000,
        "oci:",
        "oci::tag",
        "oci:path:",
        "oci:path:-bad",
        "oci:path:two  words",
        "oci:path:../../etc",
        "oci:path:" + "x" * 256,
        "oci:path@sha256:123",
        "oci:path@sha256:" + "A" * 64,
        "oci:path@sha512:" + "a" * 128,
        "docker:reg/a",
        "docker://",
        "docker:///a",
        "docker://reg.example/",
        "docker://reg.example/A",
        "docker://reg.example/a//b",
        "docker://reg.example/../a",
        "docker://reg.example/a:",
        "docker://reg.example/a:-x",
        "docker://reg.example/a:" + "x" * 129,
        "docker://reg.example/" + "a" * 256,
        "docker://user:password@reg.example/a",
        "docker://reg.example:0/a",
        "docker://reg.example:65536/a",
        "docker://reg.example:port/a",
        "docker://-reg.example/a",
        "docker://reg.example/a b",
        "docker://reg.example/a@sha256:12",
        "docker://reg.example/a?x=1",
        "https://reg.example/a",
        "docker-archive:",
        "docker-archive:a:b",
        "dir:/tmp/x",
        "containers-storage:x",
        "oci-archive:",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text(alphabet="aB1:/.@-_[] \n", max_size=24), st.sampled_from(["oci:", "docker://", "docker-archive:", ""]))
def test_text_survives_a_second_parse(rest: str, transport: str) -> None:
    try:
        reference = parse_reference(transport + rest)
    except UsageError:
        return
    assert parse_reference(str(reference)) == reference
