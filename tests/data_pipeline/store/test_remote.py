"""Remote stores: http servers that misbehave, redirects, credentials, proxies, certificates."""

import os
import pickle
import shutil
import ssl
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.store.remote import RemoteOptions
from data_pipeline.store.store import open_store
from sharpmoe.config import DataConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.errors import ConfigError, DamageError, DataError
from tests.data_pipeline.range_server import RangeServer, Request, serving
from tests.data_pipeline.store.behaviour import check_reads, check_refusals


def test_http(folder: Path, server: RangeServer, options: RemoteOptions) -> None:
    store = open_store(server.url, options)
    check_reads(store, folder)
    asked = len(server.seen)
    check_reads(pickle.loads(pickle.dumps(store)), folder)
    assert len(server.seen) - asked == 3  # all but sizes and the index from the cache
    assert all(request.headers["Accept-Encoding"] == "identity" for request in server.seen)


def test_http_without_the_file(folder: Path, options: RemoteOptions) -> None:
    with serving(folder, lambda request: "404" if "b.tar" in request.path else "ok") as server:
        check_refusals(open_store(server.url, options))


@pytest.mark.parametrize("fault", ["503", "429", "cut", "stall", "slow", "short", "shifted"])
def test_faults_that_pass(fault: str, folder: Path, options: RemoteOptions) -> None:
    """Every third request goes well."""
    with serving(folder, lambda request: fault if request.number % 3 else "ok") as server:
        store = open_store(server.url, options)
        content = (folder / "a.tar").read_bytes()
        assert [store.read("a.tar", start, 4000) for start in (0, 9000)] == [content[:4000], content[9000:13000]]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", r"the server answered 503 \(4 tries\); check the network"),
        ("stall", r"no answer \(time-out\) \(4 tries\)"),
        ("cut", r"no answer \(cut after 2048 of 4096 bytes\) \(4 tries\)"),
        ("401", "the server answered 401; check the address and the access"),
        ("whole", "does not answer range requests"),
        ("gzip", "compresses its answers"),
        ("to http://other.invalid/a", "refused a redirect to another host .other.invalid:80."),
        ("to file:///etc/passwd", "only http.s. is followed"),
        ("to /a.tar", "more than 5 redirects"),
    ],
)
def test_faults_that_stay(fault: str, message: str, folder: Path, options: RemoteOptions) -> None:
    """One clear line, without the login and the signature of the URL, and without what the server says."""
    with serving(folder, lambda _: fault) as server:
        url = server.url.replace("http://", "http://ann:hunter2@") + "?sig=signature"
        store = open_store(url, replace(options, timeout_s=0.2))
        with pytest.raises(DataError, match=message) as raised:
            store.read("a.tar", 0, 10)
    assert not isinstance(raised.value, DamageError)
    for secret in ("hunter2", "ann", "signature", "secret"):
        assert secret not in str(raised.value) + store.location
    assert raised.value.__cause__ is None


def test_a_server_that_is_not_there(options: RemoteOptions) -> None:
    with pytest.raises(DataError, match="no answer .Connection refused. .4 tries."):
        open_store("http://127.0.0.1:1", options).read("a.tar", 0, 10)


def test_redirects_within_the_policy(folder: Path, options: RemoteOptions, tmp_path: Path) -> None:
    with serving(folder) as other:

        def fault(request: Request) -> str:
            return f"to {other.url}{request.path}"

        with serving(folder, fault) as server:
            url = server.url.replace("//", "//ann:hunter2@")
            allowed = replace(options, allow_hosts=(f"127.0.0.1:{other.server_address[1]}",))
            check_reads(open_store(url, allowed), folder, 5)
            assert {request.headers.get("Authorization") for request in server.seen} == {"Basic YW5uOmh1bnRlcjI="}
            assert {request.headers.get("Authorization") for request in other.seen} == {None}
            with pytest.raises(DataError, match="refused a redirect to another host"):
                open_store(url, replace(options, cache=tmp_path / "b")).read("a.tar", 0, 10)


def test_signed_urls_are_signed_for_every_file(server: RangeServer, folder: Path, options: RemoteOptions) -> None:
    check_reads(open_store(server.url + "?sig=x", options), folder, 2)
    assert all(request.path.endswith("?sig=x") for request in server.seen)
    names = {path.name for path in options.cache.iterdir()}
    assert not any("sig" in name for name in names)


def test_threads_share_a_store(server: RangeServer, folder: Path, options: RemoteOptions) -> None:
    store, failed = open_store(server.url, options), []

    def work() -> None:
        try:
            check_reads(store, folder, 10)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_damaged_cache_is_read_past(server: RangeServer, folder: Path, options: RemoteOptions) -> None:
    store, content = open_store(server.url, options), (folder / "a.tar").read_bytes()
    store.read("a.tar", 0, 100)
    (block,) = options.cache.glob("*.block")
    block.write_bytes(bytes(4096))
    assert store.read("a.tar", 0, 100) == bytes(100)
    assert store.read("a.tar", 0, 100, fresh=True) == content[:100]
    assert store.read("a.tar", 0, 100) == content[:100]
    os.truncate(block, 50)  # a disk that was full, a machine that crashed
    assert store.read("a.tar", 0, 100) == content[:100]


def test_credentials_come_from_the_environment(
    server: RangeServer, folder: Path, options: RemoteOptions, monkeypatch
) -> None:
    url = server.url.replace("//", "//ann:${SHARDS_PASSWORD}@") + "?sig=${SHARDS_KEY}"
    with pytest.raises(DataError, match="environment variable SHARDS_PASSWORD is not set"):
        open_store(url, options)
    monkeypatch.setenv("SHARDS_PASSWORD", "hunter2")
    monkeypatch.setenv("SHARDS_KEY", "x")
    check_reads(open_store(url, options), folder, 2)
    assert server.seen[0].headers["Authorization"] == "Basic YW5uOmh1bnRlcjI="
    assert server.seen[0].path.endswith("?sig=x")
    assert DataConfig(shards=url).first_place == url


@pytest.mark.parametrize(
    "url", ["https://ann:hunter2@h/x", "https://hunter2@h/x", "s3://b/x?key=hunter2", "http://h?hunter2"]
)
def test_a_configuration_holds_no_credentials(url: str) -> None:
    """It is copied into the run's folder and logged."""
    with pytest.raises(ConfigError, match="write it as") as raised:
        load_run_config(None, ["--data.shards", url])
    assert "hunter2" not in str(raised.value)


def test_a_proxy_of_the_environment_is_used(
    server: RangeServer, folder: Path, options: RemoteOptions, monkeypatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    check_reads(open_store("http://far.invalid/", options), folder, 2)
    assert all(request.path.startswith("http://far.invalid:80/") for request in server.seen)
    asked = len(server.seen)
    monkeypatch.setenv("no_proxy", "near.invalid")
    with pytest.raises(DataError, match="no answer"):
        open_store("http://near.invalid/", replace(options, retries=0)).size("a.tar")
    assert len(server.seen) == asked


def test_names_that_a_url_has_to_quote(tmp_path: Path, folder: Path, options: RemoteOptions) -> None:
    folder.rename(tmp_path / "my säts")
    with serving(tmp_path) as server:
        check_reads(open_store(f"{server.url}/my säts", options), tmp_path / "my säts", 2)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_certificates_are_checked(folder: Path, options: RemoteOptions, tmp_path: Path, monkeypatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    extra = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *extra], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(folder, context=context) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(DataError, match="the certificate cannot be verified"):
            open_store(url, options).size("a.tar")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        check_reads(open_store(url, options), folder, 2)
        with serving(folder) as plain:
            server.fault = lambda _: f"to {plain.url}/a.tar"
            allowed = replace(options, allow_hosts=(f"127.0.0.1:{plain.server_address[1]}",))
            with pytest.raises(DataError, match="refused a redirect"):  # to http, whatever is allowed
                open_store(url, allowed).size("a.tar")
