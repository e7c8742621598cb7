/*-------------------------------------------------------------------------
 *
 * schedule.h
 *	  Which key is due when.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SCHEDULE_H
#define STATBUFFER_SCHEDULE_H

#include "clock.h"
#include "port/atomics.h"
#include "utils/dsa.h"

struct SharedBuffer;
struct SharedCounter;

/*
 * Times in the schedule are whole ticks, rounded up, so that nothing comes
 * out before it is due and nothing more than a tick late.
 */
#define SCHEDULE_TICK_USECS		INT64CONST(8000)
#define SCHEDULE_LEVELS			4
#define SCHEDULE_SLOT_BITS		6
#define SCHEDULE_SLOTS			(1 << SCHEDULE_SLOT_BITS)

/* "Nothing to do": later than every time that can be due */
#define SCHEDULE_NEVER			PG_INT64_MAX

/* A slot of the wheel: a list linked through SharedCounter.next. */
typedef struct SharedSlot
{
	dsa_pointer head;
	int64		earliest;		/* no key in the slot is due before this */
} SharedSlot;

/*
 * The schedule of one buffer: a hierarchical timing wheel that only the
 * buffer's worker turns, and an inbox through which everybody else reaches
 * it.
 *
 * A counter with its LINKED bit set is on exactly one of the lists below.
 * Whoever sets that bit puts the counter on a list: the worker on any, all
 * others on the inbox.  Only the worker clears it.
 *
 * Fields marked (w) belong to the worker that is attached to the buffer.
 * They are in shared memory because workers come and go: the next one goes on
 * where the last one stopped.  Each step keeps every counter on some list
 * before it does anything that can fail.
 */
typedef struct SharedSchedule
{
	/* newly scheduled counters; pushed by anyone, taken whole by the worker */
	pg_atomic_uint64 inbox;

	/*
	 * The time by which a process must look at this buffer: what its worker
	 * sleeps until (0 while the worker is awake), or when a worker must be
	 * there when there is none.  Who schedules something earlier lowers it,
	 * and wakes the worker, or the launcher when there is no worker.
	 */
	pg_atomic_uint64 wake_at;

	/* the first key that is due, for people to look at; may lag behind */
	pg_atomic_uint64 first_due;

	int64		interval;		/* (w) from counting to being due, in usecs */
	dsa_pointer drained;		/* (w) taken from the inbox, not yet sorted in */
	int64		tick;			/* (w) the last tick that was worked off */
	dsa_pointer due_head;		/* (w) keys that are due, first come first */
	dsa_pointer due_tail;		/* (w) */
	uint64		nscheduled;		/* (w) counters in the wheel */
	SharedSlot	slots[SCHEDULE_LEVELS * SCHEDULE_SLOTS];	/* (w) */
} SharedSchedule;

extern void schedule_init(SharedSchedule *schedule, int64 interval,
						  ClockTime now);

/* for everyone */
extern void schedule_push(struct SharedBuffer *buffer,
						  struct SharedCounter *counter, dsa_pointer self);
extern void schedule_wake(struct SharedBuffer *buffer, ClockTime when);
extern void schedule_poke(struct SharedBuffer *buffer);
extern bool schedule_has_requests(struct SharedBuffer *buffer);
extern bool schedule_has_work(struct SharedBuffer *buffer);

/* for the buffer's worker */
extern void schedule_advance(struct SharedBuffer *buffer, ClockTime now);
extern void schedule_add(struct SharedBuffer *buffer,
						 struct SharedCounter *counter, dsa_pointer self);
extern void schedule_add_first(struct SharedBuffer *buffer,
							   struct SharedCounter *counter, dsa_pointer self);
extern dsa_pointer schedule_pop_due(struct SharedBuffer *buffer);
extern void schedule_make_due(struct SharedBuffer *buffer,
							  struct SharedCounter *counter, dsa_pointer self);
extern void schedule_make_all_due(struct SharedBuffer *buffer,
								  bool failing_too, ClockTime now);
extern void schedule_retry(struct SharedBuffer *buffer, ClockTime now);
extern void schedule_sort_again(struct SharedBuffer *buffer, ClockTime now);
extern uint64 schedule_mark_due(struct SharedBuffer *buffer, uint32 flag);
extern void schedule_set_interval(struct SharedBuffer *buffer, int64 interval,
								  ClockTime now);
extern bool schedule_is_due(struct SharedBuffer *buffer,
							struct SharedCounter *counter);
extern ClockTime schedule_due_now(struct SharedBuffer *buffer,
								  struct SharedCounter *counter);
extern ClockTime schedule_next(struct SharedBuffer *buffer);
extern bool schedule_sleep_until(struct SharedBuffer *buffer,
								 ClockTime next, ClockTime when);
extern void schedule_awake(struct SharedBuffer *buffer);
extern void schedule_leave(struct SharedBuffer *buffer);

#endif							/* STATBUFFER_SCHEDULE_H */
