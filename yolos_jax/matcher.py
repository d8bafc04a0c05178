"""The Hungarian matching of DETR (arXiv 2005.12872, section 3.1), inside jit.

The assignment is a shortest augmenting path search (Jonker and Volgenant 1987; the duals of
scipy's `linear_sum_assignment`), run as one state machine over the whole batch: a trip of the loop is
one step of every image that still has work, so padded targets and finished images cost nothing.

Letters: B batch, Q queries ([DET] tokens), T targets.
"""

import jax
import jax.numpy as jnp

from yolos_jax import boxes, sharding

CLASS_COST, BOX_COST, GIOU_COST = 1.0, 5.0, 2.0  # the reference's set_cost_*
LARGEST = 1e6  # non-finite costs become this, so that the search always ends


def match(outputs, targets):
    """The query of each target, [B, T] int32; -1 where a target is padded or dropped.

    Args:
        outputs: 'pred_logits' [B, Q, C + 1] and 'pred_boxes' [B, Q, 4] (cxcywh in 0..1).
        targets: 'labels' [B, T], 'boxes' [B, T, 4] and 'valid' [B, T]. Of an image with more than Q
            valid targets the Q largest are kept.
    """
    cost = jax.lax.stop_gradient(cost_matrix(outputs, targets))
    kept = keep_largest(targets, outputs['pred_logits'].shape[1])
    return sharding.over_batch(assign)(cost, kept)


def keep_largest(targets, limit):
    """Which targets take part, bool [B, T]: the valid ones, at most the `limit` largest of an image."""
    if targets['valid'].shape[1] <= limit:
        return targets['valid']
    areas = targets['boxes'][..., 2] * targets['boxes'][..., 3]
    order = jnp.argsort(jnp.where(targets['valid'], -areas, jnp.inf), axis=1)
    return targets['valid'] & (jnp.argsort(order, axis=1) < limit)


def cost_matrix(outputs, targets):
    """What matching a target to a query costs, [B, T, Q] (models/matcher.py of the reference)."""
    probabilities = jax.nn.softmax(outputs['pred_logits'], axis=-1).swapaxes(1, 2)  # [B, C + 1, Q]
    of_label = jnp.take_along_axis(probabilities, targets['labels'][:, :, None], axis=1)
    wanted, found = targets['boxes'][:, :, None], outputs['pred_boxes'][:, None]
    distance = jnp.abs(wanted - found).sum(-1)
    overlap = boxes.giou(boxes.cxcywh_to_xyxy(wanted), boxes.cxcywh_to_xyxy(found))
    return BOX_COST * distance - CLASS_COST * of_label - GIOU_COST * overlap


def assign(cost, active):
    """The optimal assignment of rows to columns.

    Args:
        cost: float32 [B, T, Q]. Non-finite entries count as 1e6, all are clipped to +-1e6.
        active: bool [B, T], the rows to assign, at most Q of an image.

    Returns:
        The column of each row, int32 [B, T], -1 for rows that are not active.
    """
    cost = jnp.where(jnp.isfinite(cost), jnp.clip(cost, -LARGEST, LARGEST), LARGEST)
    B, T, Q = cost.shape
    trips = T * (2 * T + 2)  # more than any search takes
    state = _start(cost, active)
    state['trip'] = jnp.int32(0)
    state = jax.lax.while_loop(
        lambda s: (s['trip'] < trips) & jnp.any(s['row'] < T),
        lambda s: _trip(cost, active, s) | {'trip': s['trip'] + 1},
        state,
    )
    return state['column_of']


def _start(cost, active):
    """Rows take their cheapest column, the lowest row first: feasible and tight, so exactness is kept.

    With trained models this alone assigns nearly every target.
    """
    B, T, Q = cost.shape
    u = jnp.min(cost, axis=2)
    wish = jnp.argmin(cost, axis=2)
    first = jax.vmap(lambda wish, row: jnp.full((Q,), T).at[wish].min(row))(
        wish, jnp.where(active, jnp.arange(T), T)
    )
    won = active & (jnp.take_along_axis(first, wish, axis=1) == jnp.arange(T))
    column_of = jnp.where(won, wish, -1).astype(jnp.int32)
    row_of = jnp.where(first < T, first, -1).astype(jnp.int32)
    duals = {'u': u, 'v': jnp.zeros((B, Q))}
    return duals | {'column_of': column_of, 'row_of': row_of} | _search(active, column_of, Q)


def _search(active, column_of, Q):
    """A fresh search from each image's first row without a column; `row` is T where there is none."""
    B, T = active.shape
    waiting = active & (column_of < 0)
    row = jnp.where(waiting.any(axis=1), jnp.argmax(waiting, axis=1), T).astype(jnp.int32)
    return {
        'row': row,  # [B] the row being assigned
        'at': row,  # [B] the row whose costs are looked at next
        'sink': jnp.full((B,), -1, jnp.int32),  # [B] once found: the column to hand over next
        'low': jnp.zeros((B,)),  # [B] the length of the shortest path so far
        'dist': jnp.full((B, Q), jnp.inf),  # [B, Q] shortest known path to each column
        'via': jnp.full((B, Q), -1, jnp.int32),  # [B, Q] the row before it on that path
        'done': jnp.zeros((B, Q), bool),  # [B, Q] columns whose shortest path is final
    }


def _trip(cost, active, s):
    """One step of Dijkstra's search, or one hand-over along the path it found, for every image."""
    B, T, Q = cost.shape
    columns, rows = jnp.arange(Q), jnp.arange(T)
    pick = lambda x, i: jnp.take_along_axis(x, i[:, None], axis=1)[:, 0]
    hot = lambda i, places: i[:, None] == places

    searching = (s['row'] < T) & (s['sink'] < 0)
    at = jnp.minimum(s['at'], T - 1)
    costs = jnp.take_along_axis(cost, at[:, None, None], axis=1)[:, 0]  # [B, Q]
    reach = s['low'][:, None] + (costs - pick(s['u'], at)[:, None] - s['v'])
    nearer = searching[:, None] & ~s['done'] & (reach < s['dist'])
    dist = jnp.where(nearer, reach, s['dist'])
    via = jnp.where(nearer, at[:, None], s['via'])
    open_dist = jnp.where(s['done'], jnp.inf, dist)
    low = jnp.where(searching, open_dist.min(axis=1), s['low'])
    best = open_dist == low[:, None]
    column = jnp.argmax(best.astype(jnp.int32) + (best & (s['row_of'] < 0)), axis=1)  # free ones first
    done = s['done'] | (searching[:, None] & hot(column, columns))
    owner = pick(s['row_of'], column)
    found = searching & (owner < 0)

    # the duals move when a free column is reached
    slack = jnp.where(found[:, None] & done, low[:, None] - dist, 0)
    of_row = jnp.take_along_axis(slack, jnp.maximum(s['column_of'], 0), axis=1)
    u = s['u'] + jnp.where(s['column_of'] >= 0, of_row, 0)
    u = u + jnp.where(found[:, None] & hot(s['row'], rows), low[:, None], 0)
    sink = jnp.where(found, column, s['sink'])

    # hand one column of the path over to the row before it
    moving = sink >= 0
    taker = pick(via, jnp.maximum(sink, 0))
    taken = moving[:, None] & hot(taker, rows)
    left = pick(s['column_of'], jnp.maximum(taker, 0))
    row_of = jnp.where(moving[:, None] & hot(sink, columns), taker[:, None], s['row_of'])
    column_of = jnp.where(taken, sink[:, None], s['column_of'])
    ended = moving & (taker == s['row'])
    going = s | {
        'at': jnp.where(searching & ~found, owner, s['at']),
        'sink': jnp.where(moving, left, -1).astype(jnp.int32),
        'low': low,
        'dist': dist,
        'via': via,
        'done': done,
    }
    fresh = _search(active, column_of, Q)
    choose = lambda a, b: jnp.where(ended.reshape((B,) + (1,) * (a.ndim - 1)), a, b)
    search = {name: choose(fresh[name], going[name]) for name in fresh}
    return {'u': u, 'v': s['v'] - slack, 'column_of': column_of, 'row_of': row_of} | search
