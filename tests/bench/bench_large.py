"""What one large request does to the others: for how long a body of 50 MB keeps a worker's event loop busy at a time.

python -m tests.bench.bench_large [--megabytes N] [--rounds N]

The gateway runs in this process, under uvloop; client and upstream are threads. The model has to be rewritten.
"""

import argparse
import asyncio
import http.client
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import uvloop

from gateway.config import Settings
from tests.gateway.conftest import running

ROUTING = "version: 1\nmodels: {{prod: {{upstream: nim, base_url: '{url}', model: big}}}}\ndefault: {{serve: prod}}\n"
REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


def bodies(size: int) -> Iterator[tuple[str, bytes]]:
    """What models are shown, by kind."""
    url = b'"url":"data:image/png;base64,' + b"iVBORw0KGgoAAAANSUhEUgAA" * (size // 24) + b'"'
    picture = b'"messages":[{"role":"user","content":[{"type":"image_url","image_url":{' + url + b"}}]}]"
    text = b'"messages":[{"role":"user","content":"' + b'He said: \\"no\\".\\n' * (size // 18) + b'"}]'
    other = b'"messages":[{"role":"user","content":"' + "日本語の文章。".encode() * (size // 21) + b'"}]'
    turns = b'"messages":[' + b",".join([b'{"role":"user","content":"x"}'] * (size // 30)) + b"]"
    yield "picture, model first", b'{"model":"m",' + picture + b"}"
    yield "picture, model last", b"{" + picture + b',"model":"m"}'
    yield "picture, two models", b'{"model":"m",' + picture + b',"x":{"model":1}}'
    yield "text with escapes", b"{" + text + b',"model":"m"}'
    yield "text in Japanese", b"{" + other + b',"model":"m"}'
    yield "many short turns", b"{" + turns + b',"model":"m"}'


@contextmanager
def upstream() -> Iterator[str]:
    """Takes what comes and answers, in threads: it keeps nobody waiting."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        buffer = memoryview(bytearray(1 << 20))
        with connection:
            while (got := connection.recv(65_536, socket.MSG_PEEK)) and b"\r\n\r\n" in got:
                head = got.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
                connection.recv(len(head))
                left = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                while left and (read := connection.recv_into(buffer, min(left, len(buffer)))):
                    left -= read
                connection.sendall(REPLY)

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    server.close()


def send(port: int, body: bytes) -> int:
    """The status of one call."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    client.request("POST", "/v1/chat/completions", body=body, headers={"content-type": "application/json"})
    status = client.getresponse().status
    client.close()
    return status


async def blocks(sending: "asyncio.Future[int]") -> list[float]:
    """Seconds of the loop's own CPU time between two looks: how long it was busy without a look at anything else."""
    found, before = [], time.thread_time()
    while not sending.done():
        await asyncio.sleep(0)
        now = time.thread_time()
        found.append(now - before)
        before = now
    return found


def peak() -> float:
    """MiB that this process has had at most since the last time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    most = int(dict(line.split(":", 1) for line in lines)["VmHWM"].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return most


async def main(megabytes: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder, upstream() as url:
        routing = Path(folder) / "routing.yaml"
        routing.write_text(ROUTING.format(url=url))
        async with running(Settings(data_dir=Path(folder) / "data", routing_file=routing)) as gateway:
            port = int(gateway.url.rpartition(":")[2])
            await asyncio.to_thread(send, port, b'{"model":"m","messages":[]}')
            for name, body in bodies(megabytes * 1_000_000):
                worst, held = [], peak()
                for _ in range(rounds):
                    sending = asyncio.get_running_loop().run_in_executor(None, send, port, body)
                    worst.append(max(await blocks(sending)))
                    assert await sending == 200
                print(
                    f"{name:24}{len(body) / 1e6:4.0f} MB: busy for {median(worst) * 1000:4.0f} ms at a time, "
                    f"at worst {max(worst) * 1000:4.0f} ms; {peak() - held:4.0f} MiB"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    uvloop.run(main(arguments.megabytes, arguments.rounds))
