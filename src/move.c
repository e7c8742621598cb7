/*-------------------------------------------------------------------------
 *
 * move.c
 *	  Moving a buffer's counters to the present space.
 *
 * When most keys are gone, those that are left are moved to a new area, so that
 * the old one can be removed: see SharedSpaces.  The worker of each buffer moves
 * its counters, a portion at a time, and the launcher those of buffers without a
 * worker.
 *
 * Who has pointers to a counter, and why it may be moved nevertheless:
 *
 *	  the chain of its bucket	the lock of the partition, exclusively, while it
 *							is copied and replaced: hash_move()
 *	  transactions, requests	a pin: it is not moved
 *	  sessions, of the last	they look at SharedTable.nremoved, under the lock
 *	  scans, readers			only under the lock of the partition
 *	  the wheel, the due keys	belong to the process that has claimed the buffer,
 *							which is the one that moves: schedule_move()
 *	  the inbox				others push counters on it, and have released their
 *							pins when the list is walked; it is taken first
 *	  a batch				is empty while its buffer's counters are moved
 *	  keys of a removed buffer	are not moved, but about to be freed
 *
 * So it holds one lock at a time, for one counter.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "move.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

/* so many counters are moved in a portion, which takes some milliseconds */
#define PORTION_KEYS		10000

/* to come by so many that have moved already takes as long as moving one */
#define PASSED_PER_KEY		8

/* counters that a portion of a scan hands over; it has 256 steps, and a few */
#define SCAN_KEYS			512

/* the pause before what could not be moved is tried again */
#define AGAIN_MIN_MSECS		100
#define AGAIN_MAX_MSECS		300000

/*
 * When is there something to move in a buffer that the process has claimed?
 * Returns 0 if there is now, and SCHEDULE_NEVER if there is nothing.
 */
ClockTime
move_next(const MoveState *state, SharedBuffer *buffer)
{
	uint32		move = space_moving();

	if (likely(move == 0) || buffer->table.moved == move ||
		registry_is_dropped(buffer))
		return SCHEDULE_NEVER;
	return state->move == move && state->step == MOVE_OVER ? state->again : 0;
}

/* Begin a pass, unless there is one for the same move of the same table. */
static void
begin_pass(MoveState *state, SharedBuffer *buffer)
{
	uint32		move = space_moving();
	int			pause = 0;

	if (memcmp(&state->key, &buffer->key, sizeof(SharedBufferKey)) == 0 &&
		state->table == buffer->table.number && state->move == move)
	{
		if (state->step != MOVE_OVER)
			return;
		pause = state->pause;
	}
	memset(state, 0, sizeof(MoveState));
	state->key = buffer->key;
	state->table = buffer->table.number;
	state->move = move;
	state->pause = pause;
	table_attach(&buffer->table, &state->attached);
	table_begin_scan(&state->scan, &state->attached, false);
}

/* Move a counter.  Returns its copy, or one with a NULL pointer. */
static CounterRef
move_counter(MoveState *state, CounterRef ref, bool linked)
{
	CounterRef	copy = {NULL, InvalidDsaPointer};

	/* spare the copy that would not be used; table_move() makes sure */
	if (!counter_has_flag(ref.counter, COUNTER_PINS))
		copy = table_move(&state->buffer->table, &state->attached, ref, linked,
						  &state->full);
	if (copy.counter == NULL)
		state->some_left = true;
	state->budget--;
	return copy;
}

/* For schedule_move(). */
static CounterRef
move_linked(CounterRef ref, void *arg)
{
	MoveState  *state = arg;
	CounterRef	copy = {NULL, InvalidDsaPointer};

	/*
	 * A portion begins with the list, so it moves more the further it has to
	 * go: else a long list would take a time that is quadratic.
	 */
	if (!space_is_old(ref.self))
	{
		state->npassed++;
		return ref;
	}
	if (state->budget + state->npassed / PASSED_PER_KEY <= 0)
		return copy;
	copy = move_counter(state, ref, true);
	return copy.counter == NULL && !state->full ? ref : copy;
}

/*
 * Move the counters of a portion of the scan that are on no list.  Only this
 * process frees counters, so they are still there when the portion is over.
 * Returns false if it was the last.
 */
static bool
move_others(MoveState *state)
{
	CounterRef	refs[SCAN_KEYS];
	CounterRef	ref;
	int			n = 0;

	if (!table_begin_portion(&state->scan))
		return false;
	while ((ref = table_next(&state->scan)).counter != NULL)
	{
		if (++state->npassed % PASSED_PER_KEY == 0)
			state->budget--;
		if (!space_is_old(ref.self))
			continue;
		if (n < SCAN_KEYS &&
			!counter_has_flag(ref.counter, COUNTER_LINKED))
			refs[n++] = ref;
		else
			state->some_left = true;
	}
	for (int i = 0; i < n && !state->full; i++)
		if (move_counter(state, refs[i], false).counter != NULL)
			space_free(refs[i].self);
	return true;
}

/*
 * The pass is over.  If something is left, another one is to follow, later if it
 * has become a habit.
 */
static void
end_pass(MoveState *state, SharedBuffer *buffer)
{
	state->step = MOVE_OVER;
	if (!state->some_left)
	{
		buffer->table.moved = state->move;

		/* the launcher may look only much later whether all is moved */
		if (space_is_moved())
			launcher_slot_wake();
		return;
	}
	state->pause = Min(Max(2 * state->pause, AGAIN_MIN_MSECS), AGAIN_MAX_MSECS);
	state->again = clock_add(clock_now(), state->pause);
}

/*
 * In PG_CATCH: go on if the error is only that there is no memory.  Scans, and
 * dsa.c, raise errors with their locks held.
 */
static void
forgive_memory_error(MemoryContext context)
{
	ErrorData  *edata;

	LWLockReleaseAll();
	MemoryContextSwitchTo(context);
	edata = CopyErrorData();
	FlushErrorState();
	if (ERRCODE_TO_CATEGORY(edata->sqlerrcode) !=
		ERRCODE_INSUFFICIENT_RESOURCES)
		ReThrowError(edata);
	elog(DEBUG1, "statbuffer's counters cannot be moved: %s", edata->message);
	FreeErrorData(edata);
}

/* Go as far as the portion's budget goes. */
static void
go_on(MoveState *state, SharedBuffer *buffer)
{
	if (state->step == MOVE_LISTS &&
		schedule_move(&buffer->schedule, &state->list, move_linked, state))
		state->step = MOVE_OTHERS;
	while (state->step == MOVE_OTHERS && state->budget > 0 && !state->full)
		if (!move_others(state))
			state->step = MOVE_BUCKETS;
	if (state->step == MOVE_BUCKETS && state->budget > 0 && !state->full)
	{
		state->full = !table_move_buckets(&state->attached);
		if (!state->full)
			end_pass(state, buffer);
	}
}

/*
 * Move a portion of a buffer's counters.  The caller has claimed the buffer, has
 * no batch, and holds no lock.  It calls this again when move_next() says so,
 * and advances the schedule afterwards.
 *
 * If there is no memory, the next pass begins after a pause.  Raises an error if
 * memory cannot be mapped.
 */
void
move_portion(MoveState *state, SharedBuffer *buffer)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	Assert(registry_is_mine(buffer));
	begin_pass(state, buffer);
	state->buffer = buffer;
	state->budget = PORTION_KEYS;
	state->npassed = 0;
	PG_TRY();
	{
		/* a segment that cannot be made must not be taken for a leak */
		CurrentResourceOwner = NULL;
		go_on(state, buffer);
	}
	PG_CATCH();
	{
		CurrentResourceOwner = owner;
		state->full = true;

		/*
		 * whatever comes of it, this pass cannot go on: its scan may be
		 * locked
		 */
		state->step = MOVE_OVER;
		forgive_memory_error(context);
	}
	PG_END_TRY();
	CurrentResourceOwner = owner;
	if (unlikely(state->full))
	{
		state->some_left = true;
		end_pass(state, buffer);
	}
}
