"""The gate before TurboMind's prefill: room shared in order, whoever leaves the line, whenever."""

import asyncio
import random

import pytest

from intervale.engine.lmdeploy_patches import Gate


async def settle() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


def waiting(gate: Gate, needs: list[int], entered: list[int]) -> list[asyncio.Task[bool]]:
    async def one(number: int, need: int) -> bool:
        got = await gate.enter(need, number)
        entered.append(number)
        return got

    return [asyncio.create_task(one(number, need)) for number, need in enumerate(needs)]


def test_the_gate_lets_in_what_fits_in_their_order_and_what_is_too_large_alone() -> None:
    async def run() -> None:
        gate, entered = Gate(10), []
        waiting(gate, [6, 4, 1, 25, 2], entered)
        await settle()
        assert entered == [0, 1]
        gate.leave(4)
        await settle()
        assert entered == [0, 1, 2]
        gate.leave(6)
        await settle()
        assert entered == [0, 1, 2]  # the small one behind the large one does not overtake it
        gate.leave(1)
        await settle()
        assert (entered, gate.taken) == ([0, 1, 2, 3], 25)
        gate.leave(25)
        await settle()
        assert (entered, gate.taken) == ([0, 1, 2, 3, 4], 2)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["cancel", "drop"])
@pytest.mark.parametrize("turns", range(4))
def test_leaving_the_line_at_any_turn_of_the_loop_returns_the_room_and_lets_the_next_in(how: str, turns: int) -> None:
    async def run() -> None:
        gate, entered = Gate(10), []
        tasks = waiting(gate, [8, 9, 2], entered)
        await settle()
        asyncio.get_running_loop().call_soon(gate.leave, 8)  # task 1 is let in about when it leaves
        for _ in range(turns):
            await asyncio.sleep(0)
        dropped = how == "drop" and gate.drop(1)
        if how == "cancel":
            tasks[1].cancel()
        got = await asyncio.gather(tasks[1], return_exceptions=True)
        if got == [True]:
            gate.leave(9)
        assert not (dropped and got == [True])
        await settle()
        assert (entered[-1], gate.taken, len(gate.line), gate._turns) == (2, 2, 0, {})

    asyncio.run(run())


def test_when_the_first_of_the_line_leaves_those_it_held_up_go_in() -> None:
    async def run() -> None:
        gate, entered = Gate(10), []
        tasks = waiting(gate, [5, 9, 5], entered)
        await settle()
        assert entered == [0]
        tasks[1].cancel()
        await settle()
        assert entered == [0, 2]

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(8))
def test_under_random_leaving_no_room_is_lost_no_one_is_forgotten_and_the_order_is_kept(seed: int) -> None:
    rng = random.Random(seed)

    async def run() -> None:
        gate, inside, order = Gate(100), [], []

        async def one(number: int, need: int) -> str:
            stands = bool(gate.line) or 0 < gate.taken > 100 - need
            if not await gate.enter(need, number):
                return "dropped"
            if stands:
                order.append(number)
            inside.append(need)
            try:
                assert sum(inside) <= 100 or len(inside) == 1
                assert gate.taken >= sum(inside)
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                return "served"
            finally:
                inside.remove(need)
                gate.leave(need)

        tasks = []
        for number in range(300):
            tasks.append(asyncio.create_task(one(number, rng.choice([3, 30, 40, 70, 150]))))
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            if rng.random() < 0.3:
                tasks[rng.randrange(max(0, number - 20), number + 1)].cancel()
            if rng.random() < 0.2:
                gate.drop(rng.randrange(max(0, number - 20), number + 1))
        async with asyncio.timeout(20):
            got = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = {str(one) if isinstance(one, str) else type(one).__name__ for one in got}
        assert kinds == {"served", "dropped", "CancelledError"}
        assert (gate.taken, len(gate.line), gate._turns, inside) == (0, 0, {}, [])
        assert order == sorted(order)
        assert len(order) > 50

    asyncio.run(run())
