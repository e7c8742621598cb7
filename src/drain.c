/*-------------------------------------------------------------------------
 *
 * drain.c
 *	  Waiting for a flush of everything that was published.
 *
 * A session asks for a drain and waits for the worker: see SharedDrain.  As it
 * does not wait for a lock, no deadlock detector sees it; this room finds out
 * whether the worker waits for the session in turn.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "buffer.h"
#include "compat.h"
#include "drain.h"
#include "launch.h"
#include "miscadmin.h"
#include "registry.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"

/* How a drain stands, and which process is the worker; 0: none. */
static DrainState
look_at_drain(const SharedBufferKey *key, uint64 ticket, pid_t *worker_pid)
{
	SharedBuffer *shared = registry_lock(key);
	DrainState	state = DRAIN_WAITING;

	if (shared == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist", key->relid)));
	if (requests_drain_is_done(&shared->requests, ticket))
		state = DRAIN_DONE;
	else if (registry_is_stopped(shared))
		state = DRAIN_STOPPED;
	else if (pg_atomic_read_u32(&shared->requests.locked_out) != 0)
		state = DRAIN_BLOCKED;
	*worker_pid = shared->slot.pid;
	registry_unlock(shared);
	return state;
}

/* Has the transaction a lock on the relation, of that mode or a stronger one? */
static bool
has_locked(Oid relid, LOCKMODE weakest)
{
	LOCKTAG		tag;

	buffer_set_relation_tag(&tag, relid);
	for (LOCKMODE mode = weakest; mode <= MaxLockMode; mode++)
		if (compat_lock_held(&tag, mode))
			return true;
	return false;
}

/*
 * Does the transaction keep the worker out?  It has altered or truncated the
 * buffer, or stopped it.
 */
bool
drain_is_locked_out_by_us(SbBuffer *buffer)
{
	LOCKTAG		gate;

	if (has_locked(buffer->relid, ExclusiveLock))
		return true;
	for (int i = 0; i < buffer->shape->nrow_types; i++)
		if (has_locked(buffer->shape->row_types[i], AccessExclusiveLock))
			return true;
	buffer_set_gate_tag(&gate, buffer->relid);
	return compat_lock_held(&gate, ExclusiveLock);
}

/*
 * Does a process wait for a lock of ours, or for somebody who does?  Looks at
 * all locks of the server, so it is not to be called often.
 */
static bool
waits_for_us(int pid)
{
	List	   *pids = list_make1_int(pid);

	for (int i = 0; i < list_length(pids); i++)
	{
		Datum		blocking = DirectFunctionCall1(pg_blocking_pids,
												   Int32GetDatum(list_nth_int(pids, i)));
		ArrayType  *array = DatumGetArrayTypeP(blocking);
		int			n = ArrayGetNItems(ARR_NDIM(array), ARR_DIMS(array));

		for (int j = 0; j < n; j++)
		{
			int			other = ((int32 *) ARR_DATA_PTR(array))[j];

			if (other == MyProcPid)
				return true;
			pids = list_append_unique_int(pids, other);
		}
	}
	return false;
}

/*
 * Have everything flushed that was published so far, and wait until it is.
 * Gives up after so many milliseconds; negative: no limit.
 *
 * The caller has opened the buffer with RowShareLock, which is given back for
 * the wait.  Otherwise whoever wants to alter the buffer would wait for us,
 * the worker for him, and we for the worker; and as we don't wait for a lock,
 * nobody would notice.  When the transaction has other locks, that is what
 * DRAIN_BLOCKED tells; and DRAIN_DEADLOCK, that the handler waits for us.
 *
 * With `stopping' the caller has STOP_LOCK, which is kept: nobody publishes
 * anything meanwhile.  DRAIN_DEADLOCK then tells that the handler waits for
 * someone who is about to count.
 */
DrainState
drain_wait(SbBuffer *buffer, int64 timeout, bool stopping)
{
	ClockTime	start = clock_now();
	ClockTime	blocked_since = 0;
	ClockTime	looked_at = start;
	pid_t		worker_pid;
	SharedBuffer *shared;
	SharedBufferKey key;
	bool		locked;
	bool		loaded;
	uint64		ticket;
	DrainState	state;

	if (drain_is_locked_out_by_us(buffer))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("cannot drain buffer \"%s\" in a transaction that has locked it",
						NameStr(buffer->name)),
				 errhint("Drain it before it is altered, stopped or truncated, or after that is committed.")));

	/* what is not loaded yet can't be flushed */
	loaded = launch_await_load();
	if (!buffer_attach(buffer, false))
		return loaded ? DRAIN_DONE : DRAIN_TIMED_OUT;
	shared = buffer->shared;
	key = shared->key;
	if (shared->slot.pid == MyProcPid)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("cannot drain buffer \"%s\" from its own handler",
						NameStr(buffer->name))));
	launch_ensure();
	ticket = requests_ask_drain(&shared->requests);
	registry_call_worker(shared);

	if (!stopping)
		UnlockRelationOid(key.relid, RowShareLock);

	/* row types of keys stay locked, as they may be others' */
	locked = !stopping &&
		(has_locked(key.relid, AccessShareLock) || buffer->shape->nrow_types > 0);

	ConditionVariablePrepareToSleep(&shared_control->drain_cv);
	while ((state = look_at_drain(&key, ticket, &worker_pid)) != DRAIN_DONE)
	{
		ClockTime	now = clock_now();
		int64		left = -1;

		if (timeout >= 0)
		{
			left = timeout - (now - start) / 1000;
			if (left <= 0)
			{
				state = DRAIN_TIMED_OUT;
				break;
			}
			left = Min(left, INT_MAX);
		}

		/* it may just have been started again */
		if (state == DRAIN_STOPPED)
		{
			bool		stopped = buffer_open(key.relid, RowShareLock)->options.stopped;

			UnlockRelationOid(key.relid, RowShareLock);
			if (stopped)
				break;
		}

		/* who has locked it for a moment is not to blame */
		if (state != DRAIN_BLOCKED || !locked)
			blocked_since = 0;
		else if (blocked_since == 0)
			blocked_since = now;
		else if (clock_passed(blocked_since, now, DeadlockTimeout))
			break;

		/* as nobody sees that we wait, look whether somebody waits for us */
		if (clock_passed(looked_at, now, DeadlockTimeout))
		{
			looked_at = now;
			if (worker_pid != 0 && waits_for_us(worker_pid))
			{
				if (state != DRAIN_BLOCKED || !locked)
					state = DRAIN_DEADLOCK;
				break;
			}
		}
		left = left < 0 ? DeadlockTimeout : Min(left, DeadlockTimeout);

		(void) ConditionVariableTimedSleep(&shared_control->drain_cv, left,
										   compat_wait_event("StatbufferDrain"));
	}
	ConditionVariableCancelSleep();
	if (state == DRAIN_DONE && !loaded)
		state = DRAIN_TIMED_OUT;
	return state;
}
