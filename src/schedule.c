/*-------------------------------------------------------------------------
 *
 * schedule.c
 *	  When each key is due: a timing wheel and an inbox.
 *
 * A hierarchical timing wheel for each buffer, so that the cost of flushing
 * follows the keys that are due and not the keys that are held.  Slots of the
 * lowest level are a tick wide, those of the next 64 ticks, and so on; a key
 * moves down a level when its slot's time begins, three times at the most.
 *
 * The wheel belongs to the buffer's worker.  All others push counters on the
 * inbox without a lock and lower wake_at; see SharedSchedule.  This room knows
 * nothing of processes: the caller wakes the worker.  Pushing cannot
 * fail, because it happens after a commit.
 *
 * The worker's steps can fail where a counter's segment is mapped for the
 * first time.  Therefore each looks up the counter first and moves it then.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "schedule.h"

#define SLOT_MASK		(SCHEDULE_SLOTS - 1)
#define LEVEL_SHIFT(l)	((l) * SCHEDULE_SLOT_BITS)

/* the slot of a level that a tick falls into */
#define SLOT_OF(level, tick) \
	((level) * SCHEDULE_SLOTS + (((tick) >> LEVEL_SHIFT(level)) & SLOT_MASK))

/* SharedCounter.slot: level and index, so 256 slots at the most */
StaticAssertDecl(SCHEDULE_LEVELS * SCHEDULE_SLOTS <= 256,
				 "slot numbers must fit in a byte");

static void insert_into_wheel(SharedSchedule *schedule, CounterRef ref);
static void append_due(SharedSchedule *schedule, CounterRef ref);

/*
 * When a counter is due.  One that has nothing counted is due at once, so
 * that the worker finds it to be idle.
 */
static ClockTime
due_time(SharedSchedule *schedule, SharedCounter *counter)
{
	int64		at = (int64) pg_atomic_read_u64(&counter->counted_at);

	if (at == 0 || counter->failures > 0)
		return at;
	return at + schedule->interval;
}

static inline int64
due_tick(SharedSchedule *schedule, SharedCounter *counter)
{
	ClockTime	due = due_time(schedule, counter);

	Assert(due >= 0);
	if (due > SCHEDULE_NEVER - SCHEDULE_TICK_USECS)
		return SCHEDULE_NEVER / SCHEDULE_TICK_USECS;
	return (due + SCHEDULE_TICK_USECS - 1) / SCHEDULE_TICK_USECS;
}

/*
 * Is a counter due, as far as the wheel has turned?  What is not is put into
 * the wheel by schedule_add(), and does not come out before it turns.
 */
bool
schedule_is_due(SharedSchedule *schedule, SharedCounter *counter)
{
	return due_tick(schedule, counter) <= schedule->tick;
}

/* What a counter's `counted_at' is when it is due just now. */
ClockTime
schedule_due_now(SharedSchedule *schedule, SharedCounter *counter)
{
	ClockTime	due = schedule->tick * SCHEDULE_TICK_USECS;

	return counter->failures > 0 ? due : due - schedule->interval;
}

void
schedule_init(SharedSchedule *schedule, int64 interval, ClockTime now)
{
	pg_atomic_init_u64(&schedule->inbox, InvalidDsaPointer);
	pg_atomic_init_u64(&schedule->wake_at, SCHEDULE_NEVER);
	pg_atomic_init_u64(&schedule->first_due, SCHEDULE_NEVER);
	schedule->interval = interval;
	schedule->drained = InvalidDsaPointer;
	schedule->tick = now / SCHEDULE_TICK_USECS;
	schedule->due_head = InvalidDsaPointer;
	schedule->due_tail = InvalidDsaPointer;
	schedule->nscheduled = 0;
	schedule_forget_idle(schedule);
	schedule->reap_at = SCHEDULE_NEVER;
	for (int i = 0; i < lengthof(schedule->slots); i++)
	{
		schedule->slots[i].head = InvalidDsaPointer;
		schedule->slots[i].earliest = SCHEDULE_NEVER;
	}
}

/*
 * Put a counter, whose LINKED bit the caller has just set, on the inbox.
 *
 * Takes no lock, cannot fail.  The caller calls schedule_lower() afterwards.
 */
void
schedule_push(SharedSchedule *schedule, CounterRef ref)
{
	uint64		head = pg_atomic_read_u64(&schedule->inbox);

	Assert(counter_has_flag(ref.counter, COUNTER_LINKED));

	/* the worker takes the list whole, so that a head can't come back */
	do
	{
		ref.counter->next = head;
	} while (!pg_atomic_compare_exchange_u64(&schedule->inbox, &head, ref.self));
}

/* Set a time to `when' if that is earlier; returns whether it was. */
static bool
lower(pg_atomic_uint64 *time, ClockTime when)
{
	uint64		old = pg_atomic_read_u64(time);

	while ((ClockTime) old > when)
		if (pg_atomic_compare_exchange_u64(time, &old, (uint64) when))
			return true;
	return false;
}

/*
 * Announce that a process must look at the buffer at `when' or earlier.
 * Returns whether that is earlier than what was announced: then the caller must
 * wake the worker.
 *
 * Takes no lock, cannot fail.  The caller has written what the process is to
 * find there; the atomic operations order it against schedule_sleep_until().
 */
bool
schedule_lower(SharedSchedule *schedule, ClockTime when)
{
	pg_memory_barrier();
	(void) lower(&schedule->first_due, when);
	return lower(&schedule->wake_at, when);
}

/* Is nothing scheduled?  For the launcher, too; needs no lock. */
bool
schedule_is_empty(SharedSchedule *schedule)
{
	return !DsaPointerIsValid(pg_atomic_read_u64(&schedule->inbox)) &&
		!DsaPointerIsValid(schedule->drained) &&
		!schedule_has_due(schedule) &&
		schedule->nscheduled == 0;
}

/* ------------------------------------------------------------------------
 * What follows is for the buffer's worker alone.
 * ------------------------------------------------------------------------
 */

/*
 * Appending to the list of due keys looks at its tail.  Call this before
 * anything is taken off a list to be put there.
 */
static inline void
map_due_tail(SharedSchedule *schedule)
{
	(void) counter_at(schedule->due_tail);
}

/* Map every counter of a list. */
static void
map_list(dsa_pointer list)
{
	while (DsaPointerIsValid(list))
		list = counter_at(list)->next;
}

/*
 * A counter on the inbox may have no time yet: it was made by a transaction
 * that failed.  Unlink it, unless somebody counts just now.
 */
static bool
unlink_idle(SharedSchedule *schedule, SharedCounter *counter)
{
	if (pg_atomic_read_u64(&counter->counted_at) != 0)
		return false;

	/* idle since ever */
	counter->next = 1;
	pg_memory_barrier();
	counter_clear_flag(counter, COUNTER_LINKED);
	if (pg_atomic_read_u64(&counter->counted_at) != 0 && counter_link(counter))
		return false;
	schedule_note_idle(schedule, 1);
	return true;
}

/* Sort the newly scheduled counters in. */
static void
drain_inbox(SharedSchedule *schedule)
{

	map_due_tail(schedule);
	for (;;)
	{
		while (DsaPointerIsValid(schedule->drained))
		{
			CounterRef	ref = counter_ref(schedule->drained);

			schedule->drained = ref.counter->next;
			if (!unlink_idle(schedule, ref.counter))
				insert_into_wheel(schedule, ref);
		}

		if (!DsaPointerIsValid(pg_atomic_read_u64(&schedule->inbox)))
			break;
		schedule->drained = pg_atomic_exchange_u64(&schedule->inbox,
												   InvalidDsaPointer);
	}
}

/*
 * The first tick after the current one at which a slot begins that is not
 * empty; SCHEDULE_NEVER when the wheel is empty.
 */
static int64
next_event(SharedSchedule *schedule)
{
	int64		event = SCHEDULE_NEVER;

	for (int level = 0; level < SCHEDULE_LEVELS; level++)
	{
		int64		turn = schedule->tick >> LEVEL_SHIFT(level);

		/*
		 * The slot that the wheel stands on was emptied when it got there, so
		 * what is in it now belongs to the next time around.
		 */
		for (int k = 1; k <= SCHEDULE_SLOTS; k++)
		{
			if (DsaPointerIsValid(schedule->slots[level * SCHEDULE_SLOTS + ((turn + k) & SLOT_MASK)].head))
			{
				event = Min(event, (turn + k) << LEVEL_SHIFT(level));
				break;
			}
		}
	}
	return event;
}

/*
 * Sort the counters of a slot in again, as seen from the current tick.  They
 * are mapped, so that nothing can fail.
 */
static void
empty_slot(SharedSchedule *schedule, WheelSlot *slot)
{
	dsa_pointer list = slot->head;

	if (!DsaPointerIsValid(list))
		return;

	/* a counter can come back to this slot, so the list is cut off first */
	slot->head = InvalidDsaPointer;
	slot->earliest = SCHEDULE_NEVER;

	while (DsaPointerIsValid(list))
	{
		CounterRef	ref = counter_ref(list);

		list = ref.counter->next;
		schedule->nscheduled--;
		insert_into_wheel(schedule, ref);
	}
}

/*
 * Take in what was pushed and bring the wheel to `now'.  What is due then is
 * what schedule_pop_due() returns.
 */
void
schedule_advance(SharedSchedule *schedule, ClockTime now)
{
	int64		target = now / SCHEDULE_TICK_USECS;

	for (;;)
	{
		int64		event = next_event(schedule);
		int			nlevels;

		if (event > target)
			break;

		/* the slots that begin now; on the lower levels one always does */
		nlevels = 1;
		while (nlevels < SCHEDULE_LEVELS &&
			   (event & ((INT64CONST(1) << LEVEL_SHIFT(nlevels)) - 1)) == 0)
			nlevels++;

		/*
		 * Once the wheel stands there, what is left in such a slot counts as
		 * due the next time around.  So everything that can fail comes first.
		 */
		map_due_tail(schedule);
		for (int level = 0; level < nlevels; level++)
			map_list(schedule->slots[SLOT_OF(level, event)].head);
		schedule->tick = event;
		for (int level = nlevels - 1; level >= 0; level--)
			empty_slot(schedule, &schedule->slots[SLOT_OF(level, event)]);
	}
	if (schedule->tick < target)
		schedule->tick = target;

	drain_inbox(schedule);
}

/* Put a counter where it belongs by its due time. */
static void
insert_into_wheel(SharedSchedule *schedule, CounterRef ref)
{
	int64		due = due_tick(schedule, ref.counter);
	int64		delta = due - schedule->tick;
	int			level;
	WheelSlot  *slot;

	if (delta <= 0)
	{
		append_due(schedule, ref);
		return;
	}

	/* beyond the widest level: comes by again when the wheel has turned */
	if (delta >= INT64CONST(1) << LEVEL_SHIFT(SCHEDULE_LEVELS))
	{
		delta = (INT64CONST(1) << LEVEL_SHIFT(SCHEDULE_LEVELS)) - 1;
		due = schedule->tick + delta;
	}

	for (level = 0; delta >= INT64CONST(1) << LEVEL_SHIFT(level + 1); level++)
		;
	Assert(level < SCHEDULE_LEVELS);

	ref.counter->slot = SLOT_OF(level, due);
	slot = &schedule->slots[ref.counter->slot];
	if (!DsaPointerIsValid(slot->head))
		slot->earliest = SCHEDULE_NEVER;
	ref.counter->next = slot->head;
	slot->head = ref.self;
	slot->earliest = Min(slot->earliest, due * SCHEDULE_TICK_USECS);
	schedule->nscheduled++;
}

static void
append_due(SharedSchedule *schedule, CounterRef ref)
{
	ref.counter->next = InvalidDsaPointer;
	if (DsaPointerIsValid(schedule->due_tail))
		counter_at(schedule->due_tail)->next = ref.self;
	else
		schedule->due_head = ref.self;
	schedule->due_tail = ref.self;
}

/* Schedule a counter whose LINKED bit the worker has just set. */
void
schedule_add(SharedSchedule *schedule, CounterRef ref)
{
	Assert(counter_has_flag(ref.counter, COUNTER_LINKED));
	insert_into_wheel(schedule, ref);
}

/* The same, but it is due before all others. */
void
schedule_add_first(SharedSchedule *schedule, CounterRef ref)
{

	Assert(counter_has_flag(ref.counter, COUNTER_LINKED));
	ref.counter->next = schedule->due_head;
	schedule->due_head = ref.self;
	if (!DsaPointerIsValid(schedule->due_tail))
		schedule->due_tail = ref.self;
}

/*
 * Take the first key that is due off its list; InvalidDsaPointer when there
 * is none.  The caller clears its LINKED bit.
 */
dsa_pointer
schedule_pop_due(SharedSchedule *schedule)
{
	dsa_pointer self = schedule->due_head;

	if (DsaPointerIsValid(self))
	{
		schedule->due_head = counter_at(self)->next;
		if (!DsaPointerIsValid(schedule->due_head))
			schedule->due_tail = InvalidDsaPointer;
	}
	return self;
}

/* Set a counter's time, unless somebody else has changed it meanwhile. */
static void
set_counted_at(SharedCounter *counter, uint64 old, ClockTime new)
{
	Assert(new > 0);
	(void) pg_atomic_compare_exchange_u64(&counter->counted_at, &old,
										  (uint64) new);
}

/* Make one key due that is linked somewhere. */
void
schedule_make_due(SharedSchedule *schedule, CounterRef ref)
{
	WheelSlot  *slot;
	uint64		at;

	drain_inbox(schedule);

	/* it is in the slot that it remembers, or due already */
	slot = &schedule->slots[ref.counter->slot];
	if (slot->head == ref.self)
		slot->head = ref.counter->next;
	else
	{
		SharedCounter *before = counter_at(slot->head);

		while (before != NULL && before->next != ref.self)
			before = counter_at(before->next);
		if (before == NULL)
			return;
		before->next = ref.counter->next;
	}
	schedule->nscheduled--;
	at = pg_atomic_read_u64(&ref.counter->counted_at);
	if (at != 0 && !schedule_is_due(schedule, ref.counter))
		set_counted_at(ref.counter, at, schedule_due_now(schedule, ref.counter));
	append_due(schedule, ref);
}

/* What becomes due when the wheel is rebuilt. */
typedef enum MakeDue
{
	MAKE_DUE_NONE,
	MAKE_DUE_SOUND,				/* all but the keys that fail */
	MAKE_DUE_FAILING,			/* only these */
	MAKE_DUE_ALL
} MakeDue;

/*
 * Take everything out of the wheel, set it to `now', and sort the keys in
 * again: their times were changed, or what they mean, or they are made due.
 */
static void
rebuild(SharedSchedule *schedule, MakeDue make_due, ClockTime now)
{
	dsa_pointer all = InvalidDsaPointer;

	drain_inbox(schedule);

	/* map what is needed before anything is moved */
	map_due_tail(schedule);
	for (int i = 0; i < lengthof(schedule->slots); i++)
		map_list(schedule->slots[i].head);

	schedule->tick = now / SCHEDULE_TICK_USECS;
	for (int i = 0; i < lengthof(schedule->slots); i++)
	{
		WheelSlot  *slot = &schedule->slots[i];

		while (DsaPointerIsValid(slot->head))
		{
			dsa_pointer self = slot->head;
			SharedCounter *counter = counter_at(self);
			uint64		at = pg_atomic_read_u64(&counter->counted_at);

			slot->head = counter->next;
			counter->next = all;
			all = self;
			if (at != 0 && !schedule_is_due(schedule, counter) &&
				(make_due == MAKE_DUE_ALL ||
				 make_due == (counter->failures == 0 ? MAKE_DUE_SOUND :
							  MAKE_DUE_FAILING)))
				set_counted_at(counter, at,
							   schedule_due_now(schedule, counter));
		}
		slot->earliest = SCHEDULE_NEVER;
	}

	schedule->nscheduled = 0;
	while (DsaPointerIsValid(all))
	{
		CounterRef	ref = counter_ref(all);

		all = ref.counter->next;
		insert_into_wheel(schedule, ref);
	}
}

/* Make every key due that is scheduled; failing ones, too, or not. */
void
schedule_make_all_due(SharedSchedule *schedule, bool failing_too, ClockTime now)
{
	rebuild(schedule, failing_too ? MAKE_DUE_ALL : MAKE_DUE_SOUND, now);
}

/* Try keys that fail again now: what they fail for may have gone. */
void
schedule_retry(SharedSchedule *schedule, ClockTime now)
{
	rebuild(schedule, MAKE_DUE_FAILING, now);
}

/* Sort all keys in again: counts were cleared, and are counted anew. */
void
schedule_sort_again(SharedSchedule *schedule, ClockTime now)
{
	rebuild(schedule, MAKE_DUE_NONE, now);
}

/*
 * Set the buffer's interval.  Keys that were counted before follow it.
 */
void
schedule_set_interval(SharedSchedule *schedule, int64 interval, ClockTime now)
{

	if (schedule->interval == interval)
		return;
	schedule->interval = interval;
	rebuild(schedule, MAKE_DUE_NONE, now);
}

/*
 * Set a flag in SharedCounter.pins of every key that is due, and return how
 * many didn't have it.
 */
uint64
schedule_mark_due(SharedSchedule *schedule, uint32 flag)
{
	uint64		marked = 0;
	SharedCounter *counter;

	map_list(schedule->due_head);
	for (dsa_pointer p = schedule->due_head; DsaPointerIsValid(p);
		 p = counter->next)
	{
		counter = counter_at(p);
		if (!counter_has_flag(counter, flag))
		{
			counter_set_flag(counter, flag);
			marked++;
		}
	}
	return marked;
}

/*
 * The time of the first key that comes due, 0 when some are due already,
 * SCHEDULE_NEVER when none is scheduled.
 */
ClockTime
schedule_next(SharedSchedule *schedule)
{
	ClockTime	next = SCHEDULE_NEVER;

	if (DsaPointerIsValid(schedule->due_head))
		return 0;
	for (int i = 0; i < lengthof(schedule->slots); i++)
		if (DsaPointerIsValid(schedule->slots[i].head))
			next = Min(next, schedule->slots[i].earliest);
	return next;
}

/*
 * Announce that the first key is due at `next', and that nobody looks at the
 * buffer before `when'.  Returns false when something came in meanwhile; then
 * the worker stays awake.
 */
bool
schedule_sleep_until(SharedSchedule *schedule, ClockTime next, ClockTime when)
{
	pg_atomic_write_u64(&schedule->first_due, (uint64) next);
	pg_atomic_write_u64(&schedule->wake_at, (uint64) when);
	pg_memory_barrier();
	if (DsaPointerIsValid(pg_atomic_read_u64(&schedule->inbox)))
	{
		schedule_set_awake(schedule);
		return false;
	}
	return true;
}

/* Announce that the worker is awake, and need not be woken. */
void
schedule_set_awake(SharedSchedule *schedule)
{
	pg_atomic_write_u64(&schedule->wake_at, 0);
	pg_memory_barrier();
}

/*
 * Announce that the worker leaves without knowing what comes next.  Whoever
 * pushes something from here on lowers the time, and wakes the launcher.  If the
 * buffer wants a worker even now, the caller calls schedule_set_awake(), so that
 * the launcher looks at once.
 *
 * Called when the process ends: takes no lock, cannot fail.
 */
void
schedule_leave(SharedSchedule *schedule)
{
	pg_atomic_write_u64(&schedule->wake_at, SCHEDULE_NEVER);
	pg_memory_barrier();
}
