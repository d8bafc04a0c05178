"""The Hungarian matching of DETR (arXiv 2005.12872, section 3.1), inside jit.

The assignment is a shortest augmenting path search (Jonker and Volgenant 1987; the duals of
scipy's `linear_sum_assignment`), run as one state machine over the whole batch: a trip of the loop is
one step of every image that still has work, so padded targets and finished images cost nothing.

Every trip of the loop keeps this invariant: cost[t, q] >= u[t] + v[q] for all pairs, with equality for
assigned pairs. So an assignment of all rows has the least possible cost.

Letters: B batch, Q queries ([DET] tokens), T targets; rows are targets and columns are queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from yolos_jax import boxes, spmd

CLASS_COST, BOX_COST, GIOU_COST = 1.0, 5.0, 2.0  # the reference's set_cost_*
LARGEST = 1e6  # non-finite costs become this, so that the search always ends


def match(outputs: dict, targets: dict) -> jax.Array:
    """The query of each target, [B, T] int32; -1 where a target is padded or dropped.

    Args:
        outputs: 'pred_logits' [B, Q, C + 1] and 'pred_boxes' [B, Q, 4] (cxcywh in 0..1).
        targets: 'labels' [B, T], 'boxes' [B, T, 4] and 'valid' [B, T]. An image with more than Q valid
            targets keeps the Q largest.
    """
    if not targets['valid'].shape[1]:
        return jnp.zeros(targets['valid'].shape, jnp.int32)
    cost = jax.lax.stop_gradient(cost_matrix(outputs, targets))
    kept = keep_largest(targets, outputs['pred_logits'].shape[1])
    return spmd.over_batch(assign)(cost, kept)


def keep_largest(targets: dict, limit: int) -> jax.Array:
    """Which targets take part, bool [B, T]: the valid ones, at most the `limit` largest of an image."""
    if targets['valid'].shape[1] <= limit:
        return targets['valid']
    areas = targets['boxes'][..., 2] * targets['boxes'][..., 3]
    order = jnp.argsort(jnp.where(targets['valid'], -areas, jnp.inf), axis=1)
    return targets['valid'] & (jnp.argsort(order, axis=1) < limit)


def cost_matrix(outputs: dict, targets: dict) -> jax.Array:
    """The cost of matching each target to each query, [B, T, Q] (models/matcher.py of the reference)."""
    probabilities = jax.nn.softmax(outputs['pred_logits'], axis=-1).swapaxes(1, 2)  # [B, C + 1, Q]
    of_label = jnp.take_along_axis(probabilities, targets['labels'][:, :, None], axis=1)
    wanted, predicted = targets['boxes'][:, :, None], outputs['pred_boxes'][:, None]
    distance = jnp.abs(wanted - predicted).sum(-1)
    overlap = boxes.giou(boxes.cxcywh_to_xyxy(wanted), boxes.cxcywh_to_xyxy(predicted))
    return BOX_COST * distance - CLASS_COST * of_label - GIOU_COST * overlap


class Matching(NamedTuple):
    """The assignment so far, and the dual variables that prove it optimal."""

    u: jax.Array  # [B, T]
    v: jax.Array  # [B, Q]
    column_of: jax.Array  # [B, T] -1 for a row without a column
    row_of: jax.Array  # [B, Q] -1 for a free column


class Search(NamedTuple):
    """Dijkstra's search for the cheapest path from one row of each image to a free column."""

    row: jax.Array  # [B] the row being assigned, T where there is none
    at: jax.Array  # [B] the row whose costs are looked at next
    sink: jax.Array  # [B] the column to hand over next, -1 while it searches
    low: jax.Array  # [B] the length of the shortest path so far
    dist: jax.Array  # [B, Q] shortest known path to each column
    via: jax.Array  # [B, Q] the row before it on that path
    done: jax.Array  # [B, Q] columns whose shortest path is final


def assign(cost: jax.Array, active: jax.Array) -> jax.Array:
    """The optimal assignment of rows to columns.

    Args:
        cost: float32 [B, T, Q]. Non-finite entries count as 1e6, all are clipped to +-1e6.
        active: bool [B, T], the rows to assign, at most Q of an image.

    Returns:
        The column of each row, int32 [B, T], -1 for rows that are not active.
    """
    cost = jnp.where(jnp.isfinite(cost), jnp.clip(cost, -LARGEST, LARGEST), LARGEST)
    T = cost.shape[1]
    most_trips = T * (2 * T + 2)  # more than any search takes

    def goes_on(state: tuple) -> jax.Array:
        _, search, trips = state
        return (trips < most_trips) & jnp.any(search.row < T)

    def trip(state: tuple) -> tuple:
        """One step of the search, or one hand-over along its finished path, for every image."""
        matching, search, trips = state
        search, reached = _step_search(cost, matching, search)
        matching = _update_duals(matching, search, reached)
        matching, search, ended = _hand_over(matching, search)
        search = _where(ended, _new_search(active, matching), search)
        return matching, search, trips + 1

    matching = _start(cost, active)
    state = matching, _new_search(active, matching), jnp.int32(0)
    matching, *_ = jax.lax.while_loop(goes_on, trip, state)
    return matching.column_of


def _start(cost: jax.Array, active: jax.Array) -> Matching:
    """Each row takes its cheapest column unless a lower row wants it: feasible and tight, so still exact.

    With trained models this alone assigns nearly every target.
    """
    B, T, Q = cost.shape
    wish = jnp.argmin(cost, axis=2)
    first = jax.vmap(lambda wish, row: jnp.full((Q,), T).at[wish].min(row))(
        wish, jnp.where(active, jnp.arange(T), T)
    )  # [B, Q] the lowest row that wishes for the column
    won = active & (jnp.take_along_axis(first, wish, axis=1) == jnp.arange(T))
    return Matching(
        u=jnp.min(cost, axis=2),
        v=jnp.zeros_like(cost[:, 0]),
        column_of=jnp.where(won, wish, -1).astype(jnp.int32),
        row_of=jnp.where(first < T, first, -1).astype(jnp.int32),
    )


def _new_search(active: jax.Array, matching: Matching) -> Search:
    """A search from each image's first row without a column."""
    T, waiting = active.shape[1], active & (matching.column_of < 0)
    row = jnp.where(waiting.any(axis=1), jnp.argmax(waiting, axis=1), T).astype(jnp.int32)
    return Search(
        row=row,
        at=row,
        sink=jnp.full_like(row, -1),
        low=jnp.zeros_like(matching.u[:, 0]),
        dist=jnp.full_like(matching.v, jnp.inf),
        via=jnp.full_like(matching.row_of, -1),
        done=jnp.zeros_like(matching.row_of, bool),
    )


def _step_search(cost: jax.Array, matching: Matching, s: Search) -> tuple[Search, jax.Array]:
    """One step of Dijkstra's search, and which images [B] reached a free column by it."""
    T, Q = cost.shape[1:]
    searching = (s.row < T) & (s.sink < 0)
    at = jnp.minimum(s.at, T - 1)
    costs = jnp.take_along_axis(cost, at[:, None, None], axis=1)[:, 0]  # [B, Q]
    path = s.low[:, None] + (costs - _pick(matching.u, at)[:, None] - matching.v)
    nearer = searching[:, None] & ~s.done & (path < s.dist)
    dist = jnp.where(nearer, path, s.dist)
    via = jnp.where(nearer, at[:, None], s.via)
    open_dist = jnp.where(s.done, jnp.inf, dist)
    low = jnp.where(searching, open_dist.min(axis=1), s.low)
    best = open_dist == low[:, None]
    # among equally near columns, a free one
    order = best.astype(jnp.int32) + (best & (matching.row_of < 0)).astype(jnp.int32)
    column = jax.lax.argmax(order, 1, jnp.int32)  # argmax of jnp would be of 64 bits under x64
    done = s.done | (searching[:, None] & (column[:, None] == jnp.arange(Q)))
    owner = _pick(matching.row_of, column)
    reached = searching & (owner < 0)
    at = jnp.where(searching & ~reached, owner, s.at)
    sink = jnp.where(reached, column, s.sink)
    return Search(row=s.row, at=at, sink=sink, low=low, dist=dist, via=via, done=done), reached


def _update_duals(matching: Matching, s: Search, reached: jax.Array) -> Matching:
    """The duals after a search has reached a free column: the path's pairs become tight."""
    T = matching.u.shape[1]
    slack = jnp.where(reached[:, None] & s.done, s.low[:, None] - s.dist, 0)
    of_row = jnp.take_along_axis(slack, jnp.maximum(matching.column_of, 0), axis=1)
    u = matching.u + jnp.where(matching.column_of >= 0, of_row, 0)
    u = u + jnp.where(reached[:, None] & (s.row[:, None] == jnp.arange(T)), s.low[:, None], 0)
    return matching._replace(u=u, v=matching.v - slack)


def _hand_over(matching: Matching, s: Search) -> tuple[Matching, Search, jax.Array]:
    """Assign a column of each finished path to the row before it; also returns which paths [B] are done."""
    T, Q = matching.column_of.shape[1], matching.row_of.shape[1]
    moving = s.sink >= 0
    taker = _pick(s.via, jnp.maximum(s.sink, 0))
    given_up = _pick(matching.column_of, jnp.maximum(taker, 0))  # the taker's old column is next
    takes = moving[:, None] & (taker[:, None] == jnp.arange(T))
    taken = moving[:, None] & (s.sink[:, None] == jnp.arange(Q))
    matching = matching._replace(
        column_of=jnp.where(takes, s.sink[:, None], matching.column_of),
        row_of=jnp.where(taken, taker[:, None], matching.row_of),
    )
    sink = jnp.where(moving, given_up, -1).astype(jnp.int32)
    return matching, s._replace(sink=sink), moving & (taker == s.row)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]  # [B]


def _where(condition: jax.Array, a: Search, b: Search) -> Search:
    """For each image [B] search `a` if the condition holds, else `b`."""
    choose = lambda x, y: jnp.where(condition.reshape((-1,) + (1,) * (x.ndim - 1)), x, y)
    return jax.tree.map(choose, a, b)
