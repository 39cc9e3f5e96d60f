"""Bodies with one thing wrong get a right answer or an error of the client's: a few of them."""

import asyncio

import fuzz_requests


def test_a_few_hundred(monkeypatch):
    monkeypatch.setattr("edgevl.serve.service.Scheduler", fuzz_requests.CheckingScheduler)
    application = fuzz_requests.Application()
    statuses, failures = asyncio.run(fuzz_requests.fuzz(application, 400, seed=0))
    assert not failures
    assert statuses[200] > 50  # what harms nothing is taken
    assert statuses[400] > 50
