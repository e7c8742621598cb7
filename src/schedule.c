/*-------------------------------------------------------------------------
 *
 * schedule.c
 *	  When each key is due: a timing wheel and an inbox.
 *
 * Each buffer has a hierarchical timing wheel, so that the cost of flushing is
 * proportional to the number of keys that are due, not of those that are held.
 * Slots of the lowest level are a tick wide, those of the next 64 ticks, and so
 * on.  A key moves down a level when its slot's time begins, at most three
 * times.
 *
 * The wheel belongs to the buffer's worker.  Other processes push counters on
 * the inbox without a lock and lower wake_at; see SharedSchedule.  This file
 * knows nothing of processes: the caller wakes the worker.  Pushing cannot
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

/* the slot of a level into which a tick falls */
#define SLOT_OF(level, tick) \
	((level) * SCHEDULE_SLOTS + (((tick) >> LEVEL_SHIFT(level)) & SLOT_MASK))

/* SharedCounter.slot is a byte */
StaticAssertDecl(SCHEDULE_LEVELS * SCHEDULE_SLOTS <= 256,
				 "slot numbers must fit in a byte");

static void insert_into_wheel(SharedSchedule *schedule, CounterRef ref);
static void append_due(SharedSchedule *schedule, CounterRef ref);

/*
 * Get the time when a counter is due.  One with nothing counted is due at
 * once, so that the worker finds it to be idle.
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
 * Is a counter due, as of the last schedule_advance()?  If not, schedule_add()
 * puts it into the wheel, from where it does not return before the wheel has
 * advanced.
 */
bool
schedule_is_due(SharedSchedule *schedule, SharedCounter *counter)
{
	return due_tick(schedule, counter) <= schedule->tick;
}

/* Get the value of `counted_at' with which a counter is due now. */
ClockTime
schedule_due_now(SharedSchedule *schedule, SharedCounter *counter)
{
	ClockTime	due = schedule->tick * SCHEDULE_TICK_USECS;

	return counter->failures > 0 ? due : due - schedule->interval;
}

/*
 * Forget all counters, of a buffer that is new or that is being removed.  No
 * other process uses it.  Cannot fail.
 */
void
schedule_clear(SharedSchedule *schedule)
{
	pg_atomic_write_u64(&schedule->inbox, InvalidDsaPointer);
	schedule->drained = InvalidDsaPointer;
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

/* Initialize the schedule of a new buffer.  Cannot fail. */
void
schedule_init(SharedSchedule *schedule, int64 interval, ClockTime now)
{
	pg_atomic_init_u64(&schedule->inbox, InvalidDsaPointer);
	pg_atomic_init_u64(&schedule->wake_at, SCHEDULE_NEVER);
	pg_atomic_init_u64(&schedule->first_due, SCHEDULE_NEVER);
	schedule->interval = interval;
	schedule->tick = now / SCHEDULE_TICK_USECS;
	schedule_clear(schedule);
}

/*
 * Push a counter, whose LINKED bit the caller has just set, on the inbox.
 *
 * Takes no lock, cannot fail.  The caller calls schedule_lower() afterwards.
 */
void
schedule_push(SharedSchedule *schedule, CounterRef ref)
{
	uint64		head = pg_atomic_read_u64(&schedule->inbox);

	Assert(counter_has_flag(ref.counter, COUNTER_LINKED));

	/* no ABA problem: the worker takes the whole list at once */
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
 * Announce that a process must check the buffer at `when' or earlier.  Returns
 * whether that is earlier than what was announced before; then the caller must
 * wake the worker.
 *
 * Takes no lock, cannot fail.  The caller has already written what the process
 * is to find there; the atomic operations order it against
 * schedule_sleep_until().
 */
bool
schedule_lower(SharedSchedule *schedule, ClockTime when)
{
	pg_memory_barrier();
	(void) lower(&schedule->first_due, when);
	return lower(&schedule->wake_at, when);
}

/* Is nothing scheduled?  For the launcher, too; takes no lock. */
bool
schedule_is_empty(SharedSchedule *schedule)
{
	return !DsaPointerIsValid(pg_atomic_read_u64(&schedule->inbox)) &&
		!DsaPointerIsValid(schedule->drained) &&
		!schedule_has_due(schedule) &&
		schedule->nscheduled == 0;
}

/* ------------------------------------------------------------------------
 * What follows is for the buffer's worker only.  Functions that access a
 * counter may raise an error if its segment cannot be mapped, unless they say
 * otherwise.
 * ------------------------------------------------------------------------
 */

/*
 * Map the tail of the list of due keys, which append_due() accesses.  Call
 * this before anything is removed from another list to be appended there.
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
 * If a counter on the inbox has no time, because the transaction that made it
 * failed, unlink it.  Returns false if it has one, or if another process is
 * just adding to it.
 */
static bool
unlink_idle(SharedSchedule *schedule, SharedCounter *counter)
{
	if (pg_atomic_read_u64(&counter->counted_at) != 0)
		return false;

	/* long idle */
	counter->next = 1;
	pg_memory_barrier();
	counter_clear_flag(counter, COUNTER_LINKED);
	if (pg_atomic_read_u64(&counter->counted_at) != 0 && counter_link(counter))
		return false;
	schedule_note_idle(schedule, 1);
	return true;
}

/* Sort the counters on the inbox into the wheel. */
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
 * Get the first tick after the current one at which a non-empty slot begins,
 * or SCHEDULE_NEVER if the wheel is empty.
 */
static int64
next_event(SharedSchedule *schedule)
{
	int64		event = SCHEDULE_NEVER;

	for (int level = 0; level < SCHEDULE_LEVELS; level++)
	{
		int64		turn = schedule->tick >> LEVEL_SHIFT(level);

		/*
		 * The current slot was emptied when the wheel got there, so what it
		 * contains now belongs to the next time around.
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
 * Sort the counters of a slot in again, relative to the current tick.  They
 * are mapped, so this cannot fail.
 */
static void
empty_slot(SharedSchedule *schedule, WheelSlot *slot)
{
	dsa_pointer list = slot->head;

	if (!DsaPointerIsValid(list))
		return;

	/* detach the list first: a counter can come back to this slot */
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
 * Advance the wheel to `now', and sort in the counters on the inbox.  Keys
 * that are due by then can be taken by schedule_pop_due().
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

		/* number of levels on which a slot begins now */
		nlevels = 1;
		while (nlevels < SCHEDULE_LEVELS &&
			   (event & ((INT64CONST(1) << LEVEL_SHIFT(nlevels)) - 1)) == 0)
			nlevels++;

		/*
		 * Once the wheel is there, anything left in such a slot would be due
		 * only the next time around.  So do everything that can fail first.
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

/* Put a counter into the slot for its due time, or on the list of due keys. */
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

	/* beyond the widest level: it is sorted in again from there */
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

/*
 * Map what schedule_add() needs, so that it cannot fail for counters that are
 * mapped.
 */
void
schedule_prepare_to_add(SharedSchedule *schedule)
{
	map_due_tail(schedule);
}

/* Schedule a counter whose LINKED bit is set and that is on no list. */
void
schedule_add(SharedSchedule *schedule, CounterRef ref)
{
	Assert(counter_has_flag(ref.counter, COUNTER_LINKED));
	insert_into_wheel(schedule, ref);
}

/* Likewise, but make it due before all others.  Cannot fail. */
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
 * Remove the first key from the list of due keys, and return it, or
 * InvalidDsaPointer if there is none.  The caller clears its LINKED bit.
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

/* Set a counter's time, unless another process has changed it meanwhile. */
static void
set_counted_at(SharedCounter *counter, uint64 old, ClockTime new)
{
	Assert(new > 0);
	(void) pg_atomic_compare_exchange_u64(&counter->counted_at, &old,
										  (uint64) new);
}

/* Make a key due whose LINKED bit is set. */
void
schedule_make_due(SharedSchedule *schedule, CounterRef ref)
{
	WheelSlot  *slot;
	uint64		at;

	drain_inbox(schedule);

	/* on the inbox it may just have been found to be idle */
	if (!counter_has_flag(ref.counter, COUNTER_LINKED))
		return;
	counter_set_flag(ref.counter, COUNTER_REQUESTED);

	/* it is in the slot whose number it stores, or already due */
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

/*
 * Empty the wheel, advance it to `now', and sort all keys in again, because
 * their times or the interval have changed.  The caller may have read the clock
 * before the wheel was last advanced.
 */
static void
rebuild(SharedSchedule *schedule, ClockTime now)
{
	dsa_pointer all = InvalidDsaPointer;

	drain_inbox(schedule);

	/* map everything needed before anything is moved */
	map_due_tail(schedule);
	for (int i = 0; i < lengthof(schedule->slots); i++)
		map_list(schedule->slots[i].head);

	schedule->tick = Max(schedule->tick, now / SCHEDULE_TICK_USECS);
	for (int i = 0; i < lengthof(schedule->slots); i++)
	{
		WheelSlot  *slot = &schedule->slots[i];

		while (DsaPointerIsValid(slot->head))
		{
			dsa_pointer self = slot->head;
			SharedCounter *counter = counter_at(self);

			slot->head = counter->next;
			counter->next = all;
			all = self;
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

/*
 * Make keys of the wheel due, and set a flag in SharedCounter.pins of each:
 * those that do not fail if `sound', those that do if `failing'.
 *
 * Goes through all of them once, since there may be very many, and they are
 * seldom in the cache.  The others stay where they are.
 */
static void
make_due(SharedSchedule *schedule, bool sound, bool failing, uint32 flag)
{
	map_due_tail(schedule);
	for (int i = 0; i < lengthof(schedule->slots); i++)
	{
		WheelSlot  *slot = &schedule->slots[i];
		dsa_pointer *link = &slot->head;

		while (DsaPointerIsValid(*link))
		{
			CounterRef	ref = counter_ref(*link);
			uint64		at = pg_atomic_read_u64(&ref.counter->counted_at);

			if (at != 0 && !schedule_is_due(schedule, ref.counter))
			{
				if (ref.counter->failures == 0 ? !sound : !failing)
				{
					link = &ref.counter->next;
					continue;
				}
				set_counted_at(ref.counter, at,
							   schedule_due_now(schedule, ref.counter));
			}
			*link = ref.counter->next;
			schedule->nscheduled--;
			if (flag != 0)
				counter_set_flag(ref.counter, flag);
			append_due(schedule, ref);
		}
	}
}

/*
 * Make every scheduled key due, or without `failing_too', those that do not
 * fail.
 */
void
schedule_make_all_due(SharedSchedule *schedule, bool failing_too)
{
	drain_inbox(schedule);
	(void) schedule_mark_due(schedule, COUNTER_REQUESTED);
	make_due(schedule, true, failing_too, COUNTER_REQUESTED);
}

/* Make keys due that fail, because the cause may be gone. */
void
schedule_retry(SharedSchedule *schedule)
{
	drain_inbox(schedule);
	make_due(schedule, false, true, 0);
}

/* Sort all keys in again, because counts were cleared and counted anew. */
void
schedule_sort_again(SharedSchedule *schedule, ClockTime now)
{
	rebuild(schedule, now);
}

/*
 * Set the buffer's interval.  Keys that were counted before follow it, except
 * for those that a request has made due.
 */
void
schedule_set_interval(SharedSchedule *schedule, int64 interval, ClockTime now)
{
	SharedCounter *counter;

	if (schedule->interval == interval)
		return;

	/* these are to have the same due times with the new interval */
	map_list(schedule->due_head);
	for (dsa_pointer p = schedule->due_head; DsaPointerIsValid(p);
		 p = counter->next)
	{
		uint64		at;

		counter = counter_at(p);
		at = pg_atomic_read_u64(&counter->counted_at);
		if (at != 0 && counter->failures == 0 &&
			counter_has_flag(counter, COUNTER_REQUESTED) &&
			schedule_is_due(schedule, counter))
			set_counted_at(counter, at,
						   (ClockTime) at + schedule->interval - interval);
	}
	schedule->interval = interval;
	rebuild(schedule, now);
}

/*
 * Have the counters that are on the lists moved, beginning with list number
 * `list', which is set to where to go on.  Returns false if `move' has stopped
 * that, and otherwise, true at the end.  The caller advances the schedule
 * afterwards, because this takes what is on the inbox.
 *
 * A copy takes the place of its counter on the list, which is freed then.  On
 * error each counter is on its list, or its copy is; one that was replaced and
 * not freed does not matter, see space_free().
 */
bool
schedule_move(SharedSchedule *schedule, int *list, ScheduleMover move,
			  void *arg)
{
	for (; *list < SCHEDULE_LISTS; (*list)++)
	{
		bool		takes_inbox = false;
		dsa_pointer *link;

		if (*list < lengthof(schedule->slots))
			link = &schedule->slots[*list].head;
		else if (*list == lengthof(schedule->slots))
			link = &schedule->due_head;
		else
		{
			link = &schedule->drained;
			takes_inbox = true;
		}
		for (;;)
		{
			CounterRef	ref;
			CounterRef	copy;

			/* append what others have pushed, once */
			if (!DsaPointerIsValid(*link) && takes_inbox)
			{
				*link = pg_atomic_exchange_u64(&schedule->inbox,
											   InvalidDsaPointer);
				takes_inbox = false;
			}
			if (!DsaPointerIsValid(*link))
				break;

			ref = counter_ref(*link);
			copy = move(ref, arg);
			if (copy.counter == NULL)
				return false;
			if (copy.self != ref.self)
			{
				*link = copy.self;
				if (schedule->due_tail == ref.self)
					schedule->due_tail = copy.self;
				space_free(ref.self);
			}
			link = &copy.counter->next;
		}
	}
	return true;
}

/*
 * Set a flag in SharedCounter.pins of every due key.  Returns how many did not
 * have it.
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
 * Get the time when the first key is due, 0 if some are already, or
 * SCHEDULE_NEVER if none is scheduled.  Cannot fail.
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
 * Announce that the first key is due at `next', and that no process checks the
 * buffer before `when'.  Returns false if something was pushed meanwhile; then
 * the worker stays awake.  Cannot fail.
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

/* Announce that the worker is awake, and need not be woken.  Cannot fail. */
void
schedule_set_awake(SharedSchedule *schedule)
{
	pg_atomic_write_u64(&schedule->wake_at, 0);
	pg_memory_barrier();
}

/*
 * Announce that the worker leaves without knowing what is due next.  A process
 * that pushes after this lowers the time, and wakes the launcher.  If the buffer
 * wants a worker even now, the caller calls schedule_set_awake(), so that the
 * launcher checks the buffer at once.
 *
 * Called when the process ends: takes no lock, cannot fail.
 */
void
schedule_leave(SharedSchedule *schedule)
{
	pg_atomic_write_u64(&schedule->wake_at, SCHEDULE_NEVER);
	pg_memory_barrier();
}
