"""The stream of events of a page: it goes on when the page asks again."""

import asyncio

import pytest

from unmurk.cli.app.events import Events

DATA = {"type": "http", "method": "GET", "path": "/gradio_api/queue/data"}
DATA |= {"query_string": b"session_hash=abc", "headers": [(b"Sec-Fetch-Mode", b"cors")]}
JOIN = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join"}
JOIN |= {"query_string": b"", "headers": []}


class Gradio:
    """It answers each question after a while, and ends the stream when none is pending."""

    def __init__(self, status=200):
        self.status, self.asked, self.streams = status, asyncio.Queue(), 0
        self.pending = 0

    async def __call__(self, scope, receive, send):
        if scope["path"] == JOIN["path"]:
            message = {"more_body": True}
            while message["more_body"]:
                message = await receive()
            if self.status == 200:
                self.pending += 1
                self.asked.put_nowait("done")
            await send({"type": "http.response.start", "status": self.status})
            return await send({"type": "http.response.body", "body": b"{}"})
        self.streams += 1
        await send({"type": "http.response.start", "status": 200})

        async def chunk(text, more=True):
            await send({"type": "http.response.body", "body": text, "more_body": more})

        while True:
            await self.asked.get()
            await chunk(b'data: {"msg":"process_completed","event_id":"x"}\n\n')
            self.pending -= 1
            if not self.pending:
                await chunk(b'data: {"msg":"close_stream"}\n\n')
                return await chunk(b"", False)


class Page:
    """A browser or a program with one open stream."""

    def __init__(self, events, scope=DATA):
        self.events, self.sent, self.leaves = events, [], asyncio.Event()
        self.stream = asyncio.create_task(events(scope, self.receive, self.send))

    async def receive(self):
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    async def ask(self, name=b"abc"):
        halves = [b'{"data":[],"session_', b'hash": "' + name + b'"}']
        sent = []

        async def receive():
            return {"type": "http.request", "body": halves.pop(0), "more_body": len(halves) > 0}

        async def send(message):
            sent.append(message)

        await self.events(JOIN, receive, send)
        return sent[0]["status"]

    def said(self):
        return [
            m["body"].decode().partition('"msg":"')[2].partition('"')[0] for m in self.sent[1:]
        ]


async def soon(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("in vain")


def test_a_stream_goes_on_when_the_page_asks_again():
    """Also where it asks in the moment in which gradio ends the stream."""

    async def visit():
        gradio = Gradio()
        page = Page(Events(gradio, pause=60))
        for count in (1, 2, 3):
            assert await page.ask() == 200
            await soon(lambda count=count: page.said().count("process_completed") == count)
            if count < 3:
                await soon(lambda count=count: gradio.streams in (count, count + 1))
        await asyncio.sleep(0.05)
        assert not page.stream.done() and set(page.said()) == {"process_completed"}
        assert [m["type"] for m in page.sent].count("http.response.start") == 1
        await page.ask(b"other")  # of another page: gradio would answer it on another stream
        page.leaves.set()
        await asyncio.wait_for(page.stream, 5)

    asyncio.run(visit())


def test_a_stream_without_a_question_ends_as_gradio_ends_it():
    async def visit():
        page = Page(Events(Gradio(), pause=0.1))
        await page.ask()
        await asyncio.wait_for(page.stream, 5)
        assert page.said() == ["process_completed", "close_stream", ""]
        assert page.sent[-1]["more_body"] is False

    asyncio.run(visit())


def test_a_refused_question_is_not_waited_for():
    async def visit():
        gradio = Gradio(status=500)
        page = Page(Events(gradio, pause=0.1))
        assert await page.ask() == 500
        gradio.status = 200
        await page.ask()
        await asyncio.wait_for(page.stream, 5)
        assert page.said()[-2:] == ["close_stream", ""] and gradio.streams == 1

    asyncio.run(visit())


@pytest.mark.parametrize("scope", [DATA | {"headers": []}, DATA | {"path": "/gradio_api/x"}])
def test_other_streams_are_those_of_gradio(scope):
    """Programs open one for each question."""

    async def visit():
        page = Page(Events(Gradio(), pause=60), scope)
        await page.ask()
        await asyncio.wait_for(page.stream, 5)
        assert page.said() == ["process_completed", "close_stream", ""]

    asyncio.run(visit())


def test_few_pages_are_remembered():
    async def visit():
        page = Page(events := Events(Gradio()))
        for k in range(1200):
            await page.ask(b"p%d" % k)
        assert len(events.pages) == 1000 and "p1199" in events.pages
        page.leaves.set()
        page.stream.cancel()

    asyncio.run(visit())
