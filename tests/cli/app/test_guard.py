"""The guard of the app: who is answered, on every route, and what a request may bring."""

import asyncio

import pytest

from unmurk.cli.app.guard import FORM, SESSION, Guard, Rules, is_local

TOKEN = "t" * 32
ROUTES = [
    ("GET", "/"),
    ("GET", "/config"),
    ("GET", "/theme.css"),
    ("GET", "/assets/index.js"),
    ("GET", "/results/key/a.tif"),
    ("GET", "/gradio_api/info"),
    ("GET", "/gradio_api/queue/data"),
    ("GET", "/gradio_api/file=/tmp/x"),
    ("GET", "/gradio_api/call/restore/abc"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/call/restore"),
    ("POST", "/gradio_api/cancel"),
]


class Inner:
    """An app that reads the whole request and answers with the session that it was told."""

    def __init__(self):
        self.taken = 0

    async def __call__(self, scope, receive, send):
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            self.taken += len(message.get("body", b""))
            more = message.get("more_body", False)
        body = dict(scope["headers"])[SESSION.encode()]
        allowed = (b"access-control-allow-origin", b"*")
        await send({"type": "http.response.start", "status": 200, "headers": [allowed]})
        await send({"type": "http.response.body", "body": body})


def ask(rules, method="GET", path="/", query="", chunks=(b"",), scope_type="http", **headers):
    """Status, headers and body of the answer, and how many bytes the app was given."""
    headers.setdefault("host", "127.0.0.1:7860")
    scope = {
        "type": scope_type,
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }
    left = [
        {"type": "http.request", "body": c, "more_body": i < len(chunks) - 1}
        for i, c in enumerate(chunks)
    ]
    sent, inner = [], Inner()

    async def receive():
        return left.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(inner, rules)(scope, receive, send))
    if scope_type != "http":
        return sent
    start = sent[0]
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return start["status"], dict(start["headers"]), body, inner.taken


def test_every_route_needs_the_token_where_one_is_set():
    rules = Rules(local=False, token=TOKEN, port=9)
    for method, path in ROUTES:
        assert ask(rules, method, path)[0] == 403, path
        for wrong in ("u" * 32, "", TOKEN[:-1], TOKEN + "t"):
            assert ask(rules, method, path, authorization=f"Bearer {wrong}")[0] == 403, path
            assert ask(rules, method, path, cookie=f"unmurk-9-token={wrong}")[0] == 403, path
            assert ask(rules, method, path, query=f"token={wrong}")[0] == 403, path
        assert ask(rules, method, path, authorization=f"Bearer {TOKEN}")[0] == 200, path
        assert ask(rules, method, path, cookie=f"unmurk-9-token={TOKEN}")[0] == 200, path
        # browsers share the cookies of a host between its ports: that of another app is no key
        assert ask(rules, method, path, cookie=f"unmurk-8-token={TOKEN}")[0] == 403, path


def test_the_token_of_the_address_moves_into_a_cookie():
    rules = Rules(local=False, token=TOKEN, port=9)
    status, headers, _, _ = ask(rules, query=f"a=1&token={TOKEN}")
    assert status == 303 and headers[b"location"] == b"/?a=1"
    cookie = headers[b"set-cookie"].decode()
    assert cookie.startswith(f"unmurk-9-token={TOKEN};")
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:7860", "", "10.0.0.1"])
def test_a_local_app_answers_to_names_of_this_machine_alone(host):
    """A page elsewhere may reach 127.0.0.1 by a name of its own (DNS rebinding)."""
    for method, path in ROUTES:
        assert ask(Rules(), method, path, host=host)[0] == 403
    for own in ("127.0.0.1:7860", "localhost:1", "[::1]:7860", "LOCALHOST"):
        assert ask(Rules(), host=own)[0] == 200
    assert is_local("::1") and not is_local("0.0.0.0") and not is_local("192.168.1.2")


def test_requests_of_other_sites_are_refused():
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://[bad"):
        assert ask(Rules(), "POST", "/gradio_api/queue/join", origin=origin)[0] == 403, origin
    assert ask(Rules(), "POST", "/gradio_api/queue/join", origin="http://127.0.0.1:7860")[0] == 200


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/gradio_api/proxy=https://example.org/x"),
        ("GET", "/gradio_api/file=https://example.org/x"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/monitoring"),
        ("GET", "//evil.example/"),
        ("GET", "/runs"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/login"),
        ("PUT", "/"),
        ("DELETE", "/results/key/a.tif"),
    ],
)
def test_other_routes_are_closed(method, path):
    assert ask(Rules(), method, path)[0] == 404


def test_a_client_cannot_name_the_session_of_another_in_the_header():
    status, headers, body, _ = ask(Rules(port=9), **{SESSION.replace("-", "_"): "A" * 32})
    assert status == 200 and body != b"A" * 32 and len(body) == 32
    assert headers[b"set-cookie"].startswith(b"unmurk-9-session=" + body)
    again = ask(Rules(port=9), cookie=f"unmurk-9-session={body.decode()}")
    assert again[2] == body and b"set-cookie" not in again[1]
    for odd in ("short", "A" * 31 + "/", "A" * 33):
        assert ask(Rules(port=9), cookie=f"unmurk-9-session={odd}")[2] != odd.encode()
    assert len({ask(Rules())[2] for _ in range(20)}) == 20


def test_uploads_and_other_requests_are_bounded():
    rules = Rules(upload=1024 * 2**20)
    where = ("POST", "/gradio_api/upload")
    status, _, body, _ = ask(rules, *where, content_length=str(1025 * 2**20 + 1))
    assert status == 413 and b"an upload may have 1024 MiB: give fewer" in body
    rules = Rules(upload=1000 - FORM)
    assert ask(rules, *where, content_length="1001")[0] == 413
    assert ask(rules, *where, content_length="-1")[0] == 413
    status, *_, taken = ask(rules, *where, chunks=[b"a" * 400] * 5)  # no length is stated
    assert status == 413 and taken == 800
    status, *_, taken = ask(rules, *where, chunks=[b"a" * 500] * 2)
    assert status == 200 and taken == 1000
    assert ask(rules, "POST", "/gradio_api/queue/join", content_length=str(2**22 + 1))[0] == 413
    assert ask(Rules(room=lambda: False), *where)[0] == 507


def test_the_browser_is_told_to_load_nothing_from_elsewhere():
    _, headers, _, _ = ask(Rules())
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    assert headers[b"referrer-policy"] == b"no-referrer"
    assert b"access-control-allow-origin" not in headers
    assert b"content-security-policy" in ask(Rules(), host="evil.example")[1]


def test_web_sockets_are_closed():
    assert ask(Rules(), scope_type="websocket") == [{"type": "websocket.close", "code": 1008}]
