"""Deterministic simulation of a whole engine: `python -m tests.sim --seeds 200`, see `tests/sim/__main__.py`.

The real `ClientCore`s, `Core` and `WorkerCore`s talk over a fake network in virtual time. Programs, delays and faults
are drawn from a seed; the same seed gives the same run. The way through the files:

    plans       what user programs do, and what must come out (the oracle)
    world       clock, events, randomness, log, settings of a seed
    network     links that delay and break
    process     what all peers of the dispatcher have in common: connecting, freezing, dying
    submitter   futures around a `ClientCore`, as clients and executors have them
    client      a program that submits roots, waits, cancels, leaves
    executor    sync and async executors around a `WorkerCore`
    node        supervisor: starts, kills, reports
    dispatcher  the shell around `Core`, with the checks of everything that it sends
    faults      what goes wrong, and when it stops
    run         one seed from start to verdict
"""
