"""The server, or the network to it, breaks and comes back: the bus says so, and mends itself."""

import asyncio
import time

import pytest
import structlog

from context_server.bus import BusState, RunQueued
from context_server.bus import linked as linked_module
from context_server.bus.linked import LinkedBus
from context_server.bus.outbox import MAX_CONTEXTS
from context_server.records import new_id
from tests.unit.bus.nodes import DEADLINE_SECONDS, HASTY, hear_each_other, moved, until


@pytest.mark.scenario("wake-ups", "The server ends a connection")
async def test_a_connection_that_the_server_ends_is_made_again_and_what_was_missed_is_a_gap(server):
    with structlog.testing.capture_logs() as logs:
        async with server.nodes(2) as nodes:
            for times in range(1, 4):
                gaps = [node.gaps for node in nodes]
                await server.sever()
                await until(lambda times=times: [node.counted("bus_reconnects_total") for node in nodes] == [times] * 2)
                assert all(node.gaps > gap for node, gap in zip(nodes, gaps, strict=True))
                await hear_each_other(nodes)
    events = [(log["event"], log["log_level"]) for log in logs]
    assert sorted(events) == [("bus_lost", "warning")] * 6 + [("bus_regained", "info")] * 6


@pytest.mark.scenario("wake-ups", "The server is away for a while")
async def test_a_server_that_comes_back_is_found(server):
    async with server.nodes(2) as nodes:
        with structlog.testing.capture_logs() as logs:
            server.stop()
            for node in nodes:
                await node.is_in(BusState.POLLING)
            begun = time.monotonic()
            for number in range(MAX_CONTEXTS + 100):
                nodes[0].bus.publish(moved(version=number))
            assert time.monotonic() - begun < 5  # It waited for nothing.
            gaps = nodes[1].gaps
            server.start()
            for node in nodes:
                await node.is_in(BusState.CONNECTED)
            await until(lambda: nodes[1].gaps > gaps)
            await hear_each_other(nodes)
        assert [log["event"] for log in logs].count("bus_lost") == 2
        assert nodes[0].counted("wake_ups_dropped_total", reason="disconnected") >= MAX_CONTEXTS + 100
        assert not [each for each in nodes[1].heard if each.version not in (1, None)]


@pytest.mark.scenario("wake-ups", "One node could not send")
async def test_what_a_node_could_not_send_is_a_gap_for_the_others(server, proxy):
    async with server.nodes(1) as (there,), server.nodes(1, HASTY, port=proxy.port) as (here,):
        await hear_each_other([here, there])
        proxy.refuse()
        await here.is_in(BusState.POLLING)
        gaps = there.gaps
        here.bus.publish(RunQueued())
        assert here.own[-1] == RunQueued()
        proxy.mend()
        await until(lambda: there.gaps > gaps)
        assert there.bus.state is BusState.CONNECTED
        assert RunQueued() not in there.heard
        await hear_each_other([here, there])


@pytest.mark.scenario("wake-ups", "A connection that is deaf")
async def test_a_deaf_connection_is_noticed_and_replaced(server, proxy):
    async with server.nodes(2) as (_, speaker):
        node = server.node(HASTY, port=proxy.port)
        async with node.bus:
            await node.is_in(BusState.CONNECTED)
            await server.deafen(proxy)
            node.bus.follow_all()
            try:
                await node.is_in(BusState.POLLING)
            finally:
                await server.undeafen(proxy)
            gaps = node.gaps
            await node.is_in(BusState.CONNECTED)
            await until(lambda: node.gaps > gaps)
            await hear_each_other([node, speaker])


@pytest.mark.scenario("wake-ups", "A connection that is deaf")
async def test_without_the_echo_deafness_is_not_noticed(server, proxy, monkeypatch):
    """The negative control: beside a node that notices."""
    watched, unwatched = server.node(HASTY, port=proxy.port), server.node(HASTY, port=proxy.port)
    monkeypatch.setattr(unwatched.bus, "_watch", asyncio.Event().wait)
    async with watched.bus, unwatched.bus:
        await server.deafen(proxy)
        watched.bus.follow_all()
        unwatched.bus.follow_all()
        try:
            await watched.is_in(BusState.POLLING)
            await asyncio.sleep(HASTY.deaf / 2)  # Half as long again as one that watches would have taken.
            assert unwatched.bus.state is BusState.CONNECTED
        finally:
            await server.undeafen(proxy)


@pytest.mark.scenario("wake-ups", "A network that loses everything")
async def test_a_network_that_swallows_everything_is_noticed(server, proxy):
    async with server.nodes(1) as (there,), server.nodes(1, HASTY, port=proxy.port) as (here,):
        proxy.cut()
        here.bus.publish(moved())
        await here.is_in(BusState.POLLING)
        gaps = there.gaps
        proxy.mend()
        await here.is_in(BusState.CONNECTED)
        # Whether its last words arrived is not known to it.
        await until(lambda: there.gaps > gaps)
        await hear_each_other([here, there])


@pytest.mark.scenario("wake-ups", "Start without the bus's server")
async def test_a_node_begins_without_its_server_and_finds_it_later(server, proxy):
    proxy.refuse()
    async with server.nodes(1) as (there,):
        node = server.node(HASTY, port=proxy.port)
        async with node.bus:
            assert node.bus.state is BusState.POLLING
            assert node.counted("bus_connected") == 0
            proxy.mend()
            node.bus.follow_all()
            await node.is_in(BusState.CONNECTED)
            assert node.counted("bus_connected") == 1
            await hear_each_other([node, there])
        assert node.bus.state is BusState.POLLING


async def test_a_server_that_hangs_holds_up_neither_the_start_nor_the_end(server, proxy):
    proxy.cut()
    timing = linked_module.Timing(start=0.1, flush=0.1)
    begun = time.monotonic()
    async with server.node(timing, port=proxy.port).bus as bus:
        assert bus.state is BusState.POLLING
    assert time.monotonic() - begun < DEADLINE_SECONDS / 6


@pytest.mark.scenario("wake-ups", "Close while the server hangs")
async def test_closing_takes_no_longer_than_it_may_when_the_server_hangs(server, proxy):
    before = asyncio.all_tasks()
    timing = linked_module.Timing(start=DEADLINE_SECONDS, flush=0.2)
    async with server.node(timing, port=proxy.port).bus as bus:
        assert bus.state is BusState.CONNECTED
        await until(bus._idle.is_set)
        proxy.cut()
        for _ in range(100):
            bus.publish(moved())
        await until(lambda: not bus._outbox)  # Some of it is under way now.
        bus.publish(moved())
        begun = time.monotonic()
    assert time.monotonic() - begun < DEADLINE_SECONDS / 6
    bus.publish(moved())
    assert asyncio.all_tasks() == before


@pytest.mark.scenario("wake-ups", "What was said last arrives")
async def test_what_is_published_right_before_the_end_still_arrives(server):
    async with server.nodes(1) as (there,):
        async with server.nodes(1) as (here,):
            last = [moved() for _ in range(1000)]
            for wake_up in last:
                here.bus.publish(wake_up)
        await there.hears(*last)


async def test_a_listener_that_raises_disturbs_nobody(server):
    def fail(*_):
        raise RuntimeError

    async with server.nodes(2) as (here, there):
        for node in (here, there):
            assert isinstance(node.bus, LinkedBus)
            node.bus.subscribe(fail)
            node.bus.on_gap(fail)
        with structlog.testing.capture_logs() as logs:
            await hear_each_other([here, there])
            await server.sever()
            await hear_each_other([here, there])
        assert {log["event"] for log in logs} >= {"bus_listener_failed"}
        context_id = new_id()
        here.bus.publish(moved(context_id))
        await there.hears(moved(context_id))
