"""A session on a websocket: what comes and what goes keeps its order, however it is cut and however long it is."""

from wsproto.events import Ping, TextMessage

from tests.eman_hub import hub, peer

NS = "/communication,"


async def test_frames_of_one_read_and_in_any_number_of_parts_are_heard_in_order() -> None:
    async with hub() as address, peer(address, "listener", "x") as listener, peer(address, "asker") as asker:
        requests = [
            f'42{NS}["api:request",{{"name":"x","request_id":"{n}","sender_id":"a","timeout_ms":0}}]' for n in range(60)
        ]
        frames = [asker.ws._wsproto.send(TextMessage(text)) for text in requests[:40]]
        parts = [TextMessage(text[:30], message_finished=False) for text in requests[40:]]
        rests = [TextMessage(text[30:]) for text in requests[40:]]
        for part, rest in zip(parts, rests, strict=True):
            frames += [asker.ws._wsproto.send(part), asker.ws._wsproto.send(Ping(b"?")), asker.ws._wsproto.send(rest)]
        await asker.ws._stream.send_all(b"".join(frames))
        for n in range(60):
            name, request = await listener.event()
            assert (name, request["request_id"]) == ("x", str(n))


async def test_a_large_message_does_not_let_later_ones_overtake_it() -> None:
    async with hub() as address, peer(address, "listener", "x") as listener, peer(address, "asker") as asker:
        for n in range(20):
            data = "x" * (200_000 if n % 3 == 0 else 5)
            await asker.ask("x", str(n), timeout_ms=0, data=data)
        for n in range(20):
            name, request = await listener.event()
            assert (name, request["request_id"], len(request["data"])) == ("x", str(n), 200_000 if n % 3 == 0 else 5)
