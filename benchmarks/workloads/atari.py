"""The workload of "Real-Time Machine Learning: The Missing Pieces": Atari simulations in turn with a policy.

A *turn* of one simulation takes some frames in an emulator and yields the next observation; a policy network then says
for a batch of observations how likely each action is in the next turn. Nothing here knows what runs it, and it runs in
Spark's environment too: numpy and ale_py only.

All of it is exact, so that a trajectory depends on its seed alone and not on where its turns ran or which others shared
its policy's batch: the network's weights and activations are small integers (in float32, whose sums of integers
below 2**24 have no rounding, in whatever order), and actions are drawn by a generator that is seeded with the
simulation's number and turn.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import time
from typing import Final, NamedTuple

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

GAMES: Final = ("breakout", "pong")
#: Rows and columns of an observation: the screen's playing field, every other pixel.
SHAPE: Final = (84, 80)
#: Frames for which an action is held.
SKIP: Final = 4
#: The fewest actions among the games; others of a game are left out.
ACTIONS: Final = 4

_MASK: Final = (1 << 64) - 1

Floats = NDArray[np.float32]


class Simulation(NamedTuple):
    """One simulation between two turns: all that the next one needs, wherever it runs."""

    number: int
    turn: int
    state: bytes  # ale_py's ALEState, pickled: the emulator's memory
    screen: bytes  # the observation
    digest: bytes  # of all actions, rewards and memories so far
    reward: int


#: A simulation on its way: a tuple of what every pickler knows.
Packed = tuple[int, int, bytes, bytes, bytes, int]


def emulator(number: int) -> ALEInterface:
    """A new one with the game of this simulation, in its first frame."""
    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale = ALEInterface()
    ale.setInt("random_seed", 1)
    ale.setFloat("repeat_action_probability", 0.0)
    rom = roms.get_rom_path(GAMES[number % len(GAMES)])
    assert rom is not None, "it is in ale-py's wheel"
    ale.loadROM(rom)
    return ale


@functools.cache
def _kept(game: int) -> ALEInterface:
    return emulator(game)


def observe(ale: ALEInterface) -> bytes:
    """What the policy sees."""
    screen: bytes = ale.getScreenGrayscale()[18:186:2, ::2].tobytes()
    return screen


def _save(ale: ALEInterface) -> bytes:
    return pickle.dumps(ale.cloneState(include_rng=True), pickle.HIGHEST_PROTOCOL)


def _draw(state: int) -> int:
    """The next state of a generator of 64 bits; its upper half is random enough."""
    return (state * 6364136223846793005 + 1442695040888963407) & _MASK


def _seed(number: int, turn: int) -> int:
    return _draw(_draw((number << 32 | turn) ^ 0x9E3779B97F4A7C15))


def frames_of(number: int, turn: int, mean: float) -> int:
    """How many frames this turn takes: between half and one and a half of the mean, as tasks of a simulation differ."""
    share = 0.5 + (_seed(turn, number) >> 32) / 2**32
    return max(SKIP, round(mean * share / SKIP) * SKIP)


def play(ale: ALEInterface, number: int, turn: int, weights: NDArray[np.int64], mean: float) -> tuple[bytes, int]:
    """One turn in an emulator that is where the turn begins: a digest of what happened, and the reward."""
    actions = ale.getMinimalActionSet()[:ACTIONS]
    below = np.cumsum(weights).tolist()
    whole = below[-1]
    state, reward, taken = _seed(number, turn), 0, bytearray()
    for _ in range(frames_of(number, turn, mean) // SKIP):
        state = _draw(state)
        ticket = (state >> 32) * whole >> 32
        choice = 0
        while ticket >= below[choice]:
            choice += 1
        taken.append(choice)
        action = actions[choice]
        for _ in range(SKIP):
            reward += ale.act(action)
        if ale.game_over():
            ale.reset_game()
    return hashlib.sha256(taken + reward.to_bytes(4, "little", signed=True) + ale.getRAM().tobytes()).digest(), reward


def first(number: int) -> Packed:
    """A simulation before its first turn."""
    ale = _kept(number % len(GAMES))
    ale.reset_game()
    return number, 0, _save(ale), observe(ale), b"", 0


def simulate(packed: Packed, weights: NDArray[np.int64], mean: float) -> Packed:
    """One turn, by an emulator that this process keeps for the game."""
    before = Simulation(*packed)
    ale = _kept(before.number % len(GAMES))
    ale.restoreState(pickle.loads(before.state))
    happened, reward = play(ale, before.number, before.turn, weights, mean)
    digest = hashlib.sha256(before.digest + happened).digest()
    return before.number, before.turn + 1, _save(ale), observe(ale), digest, before.reward + reward


def screens(simulations: list[Packed]) -> list[bytes]:
    """Their observations."""
    return [Simulation(*packed).screen for packed in simulations]


def make_ready() -> None:
    """Whatever a process does only once."""
    for game in range(len(GAMES)):
        policy([first(game)[3]])


@functools.cache
def _network() -> tuple[Floats, Floats, Floats, Floats]:
    """The layers' weights: integers from -3 to 3."""
    random = np.random.default_rng(17)
    # inputs x outputs: 16 filters of 8x8, 32 of 4x4 over 16 channels, 256 units, the actions
    sizes = ((64, 16), (256, 32), (9 * 8 * 32, 256), (256, ACTIONS))
    first_, second, third, last = (random.integers(-3, 4, size).astype(np.float32) for size in sizes)
    return first_, second, third, last


def _activate(sums: Floats, shift: int) -> Floats:
    """Integers from 0 to 255."""
    scaled: Floats = np.clip(np.floor(sums / np.float32(1 << shift)), 0, 255)
    return scaled


def policy(screens: list[bytes]) -> NDArray[np.int64]:
    """How likely each action is, for each of these observations: integers, (observations, ACTIONS).

    The network that first learned to play Atari games (two convolutions, one hidden layer), with random weights.
    """
    one, two, three, four = _network()
    images = np.frombuffer(b"".join(screens), np.uint8).reshape(-1, *SHAPE).astype(np.float32)
    count = len(images)
    patches = sliding_window_view(images, (8, 8), axis=(1, 2))[:, ::4, ::4].reshape(-1, 64)
    maps = _activate(patches @ one, 5).reshape(count, 20, 19, 16)
    windows = sliding_window_view(maps, (4, 4), axis=(1, 2))[:, ::2, ::2]
    hidden = _activate(windows.reshape(-1, 256) @ two, 6).reshape(count, -1)
    scores = _activate(hidden @ three, 7) @ four
    likely: NDArray[np.int64] = 1 + (np.clip(scores - scores.min(axis=1, keepdims=True), 0, 4095)).astype(np.int64)
    return likely


def fingerprint_of(simulations: list[Packed]) -> str:
    """The same of simulations in any order."""
    return fingerprint([Simulation(*packed).digest for packed in sorted(simulations)])


def fingerprint(digests: list[bytes]) -> str:
    """What these trajectories were, all of them: the simulations' digests in the order of their numbers."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def frames_per_ms(seconds: float = 0.5) -> float:
    """How many frames this machine emulates in a millisecond, by the mean of the games."""
    ales = [emulator(number) for number in range(len(GAMES))]
    weights = np.ones(ACTIONS, np.int64)
    best = 0.0
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end:
        start = time.perf_counter()
        frames = 0
        for number, ale in enumerate(ales):
            play(ale, number, turn, weights, 100)
            frames += frames_of(number, turn, 100)
        best = max(best, frames / (time.perf_counter() - start) / 1e3)
        turn += 1
    return best
