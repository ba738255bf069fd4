"""A mixture counted one row at a time: what its closed forms are compared with."""


def sources_one_by_one(weights):
    """Smooth weighted round-robin, endlessly: every source earns its weight, the richest pays the total."""
    credit = {source: 0 for source in range(len(weights))}
    while True:
        for source, weight in enumerate(weights):
            credit[source] += weight
        richest = max(credit.values())
        pick = min(source for source, has in credit.items() if has == richest)
        credit[pick] -= sum(weights)
        yield pick
