/*-------------------------------------------------------------------------
 *
 * drain.c
 *	  Waiting for a flush of everything that was published.
 *
 * A session asks for a drain and waits for the worker: see SharedDrain.  As it
 * does not wait for a lock, the deadlock detector does not see it.  So this
 * file checks whether the worker waits for the session in turn.
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
#include "utils/timestamp.h"

/* The state of a session that waits for a drain. */
typedef struct DrainWait
{
	SharedBufferKey key;
	const char *name;			/* of the buffer */
	uint64		ticket;
	bool		locked;			/* holds locks that may block others */
	ClockTime	start;
	int64		timeout;		/* milliseconds; negative: no limit */
	ClockTime	blocked_since;	/* 0 if it is not blocked */
	ClockTime	looked_at;		/* time of the last deadlock check */

	/* failures */
	uint64		nfailures;		/* SharedFailure.number, when last looked at */
	SharedFailure failure;		/* the last one, if it is new */
	bool		is_new;			/* it was not told yet */
	char	   *told;			/* message of the last one told, or NULL */
} DrainWait;

/*
 * Get the state of a drain, and the PID of the worker, or 0.  Also looks for a
 * new failure.  Locks the registry's partition.  Raises an error if the buffer is
 * gone.
 */
static DrainState
look_at_drain(DrainWait *wait, pid_t *worker_pid)
{
	SharedBuffer *shared = registry_lock(&wait->key);
	DrainState	state = DRAIN_WAITING;

	if (shared == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist",
						wait->key.relid)));
	if (registry_count_failures(shared) != wait->nfailures)
	{
		registry_get_failure(shared, &wait->failure);
		wait->nfailures = wait->failure.number;
		wait->is_new = true;
	}
	if (requests_drain_is_done(&shared->requests, wait->ticket))
		state = DRAIN_DONE;
	else if (registry_is_stopped(shared))
		state = DRAIN_STOPPED;
	else if (pg_atomic_read_u32(&shared->requests.locked_out) != 0)
		state = DRAIN_BLOCKED;
	*worker_pid = shared->slot.pid;
	registry_unlock(shared);
	return state;
}

/*
 * Does the transaction hold a lock on the relation, of that mode or a stronger
 * one?
 */
static bool
has_locked(Oid relid, LOCKMODE weakest)
{
	LOCKTAG		tag;

	buffer_set_relation_tag(&tag, relid);
	return compat_lock_held_or_stronger(&tag, weakest);
}

/*
 * Does this transaction itself keep the worker out, because it has altered,
 * truncated or stopped the buffer?
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
 * Does a process wait, directly or not, for a lock that this process holds?
 * Follows waits for locks only: not those of other sessions for drains.
 * Checks all locks of the server, so it must not be called often.
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
 * Warn of a new failure, unless it is the one that was told last: a key that is
 * tried again and again fails with the same message.
 */
static void
tell_failure(DrainWait *wait)
{
	const SharedFailure *failure = &wait->failure;
	const char *newline = failure->detail[0] != '\0' ? "\n" : "";

	if (!wait->is_new)
		return;
	wait->is_new = false;
	if (wait->told != NULL && strcmp(wait->told, failure->message) == 0)
		return;
	if (wait->told != NULL)
		pfree(wait->told);
	wait->told = pstrdup(failure->message);
	ereport(WARNING,
			(errmsg("could not flush buffer \"%s\": %s",
					wait->name, failure->message),
			 failure->retry_at == 0 ?
			 errdetail("%s%sThere is no further attempt, because the buffer's option \"restart\" is \"temporary\".",
					   failure->detail, newline) :
			 errdetail("%s%sThe next attempt is at %s.",
					   failure->detail, newline,
					   timestamptz_to_str(failure->retry_at + clock_to_timestamp())),
			 failure->hint[0] != '\0' ? errhint("%s", failure->hint) : 0));
}

/* Error context callback, for an error that ends the wait. */
static void
wait_context(void *arg)
{
	DrainWait  *wait = arg;

	if (wait->told != NULL)
		errcontext("while waiting for buffer \"%s\", which could not be flushed: %s",
				   wait->name, wait->told);
	else
		errcontext("while waiting for buffer \"%s\" to be flushed", wait->name);
}

/* Sleep until something happens, up to `msecs'. */
static void
sleep_up_to(DrainWait *wait, int64 msecs)
{
	ErrorContextCallback callback = {
		.previous = error_context_stack,
		.callback = wait_context,
		.arg = wait
	};

	error_context_stack = &callback;
	(void) ConditionVariableTimedSleep(&shared_control->drain_cv, msecs,
									   compat_wait_event("StatbufferDrain"));
	error_context_stack = callback.previous;
}

/*
 * Check the state of a drain.  Returns DRAIN_WAITING if the session should go
 * on waiting, for up to `msecs'.
 */
static DrainState
check_wait(DrainWait *wait, int64 *msecs)
{
	ClockTime	now = clock_now();
	pid_t		worker_pid;
	DrainState	state = look_at_drain(wait, &worker_pid);

	if (state == DRAIN_DONE)
		return state;
	*msecs = DeadlockTimeout;
	if (wait->timeout >= 0)
	{
		int64		left = wait->timeout - (now - wait->start) / 1000;

		if (left <= 0)
			return DRAIN_TIMED_OUT;
		*msecs = Min(left, *msecs);
	}

	/* it may have been restarted since */
	if (state == DRAIN_STOPPED)
	{
		bool		stopped = buffer_open(wait->key.relid, RowShareLock)->options.stopped;

		UnlockRelationOid(wait->key.relid, RowShareLock);
		if (stopped)
			return DRAIN_STOPPED;
	}

	/* ignore sessions that lock it only for a moment */
	if (state != DRAIN_BLOCKED || !wait->locked)
		wait->blocked_since = 0;
	else if (wait->blocked_since == 0)
		wait->blocked_since = now;
	else if (clock_passed(wait->blocked_since, now, DeadlockTimeout))
		return DRAIN_BLOCKED;

	/* the deadlock detector does not see our wait, so check for it here */
	if (clock_passed(wait->looked_at, now, DeadlockTimeout))
	{
		wait->looked_at = now;
		if (worker_pid != 0 && waits_for_us(worker_pid))
			return state == DRAIN_BLOCKED && wait->locked ?
				DRAIN_BLOCKED : DRAIN_DEADLOCK;
	}
	return DRAIN_WAITING;
}

/* Raise an error if the drain would wait for this transaction itself. */
static void
check_not_ours(SbBuffer *buffer)
{
	if (drain_is_locked_out_by_us(buffer))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("cannot drain buffer \"%s\" in a transaction that has locked it",
						NameStr(buffer->name)),
				 errhint("Drain it before it is altered, stopped or truncated, or after that is committed.")));
}

/*
 * Flush everything that was published so far, and wait for it, for up to
 * `timeout' milliseconds; negative means no limit.  With `tell', warns of failures.
 *
 * The caller has opened the buffer with RowShareLock, which is released for
 * the wait.  Otherwise, a session that wants to alter the buffer would wait
 * for us, the worker for that session, and we for the worker; and because we
 * do not wait for a lock, the deadlock detector would not notice.  If the
 * transaction has other locks on the buffer, DRAIN_BLOCKED means that this has
 * happened, and DRAIN_DEADLOCK means that the handler waits for us.
 *
 * With `stopping', the caller holds STOP_LOCK, which is kept: no session
 * publishes anything meanwhile.  Then DRAIN_DEADLOCK means that the handler
 * waits for a session that is about to count.
 *
 * Raises an error if the transaction itself keeps the worker out, in the
 * buffer's own handler, and if the buffer is gone.
 */
DrainState
drain_wait(SbBuffer *buffer, int64 timeout, bool stopping, bool tell)
{
	DrainWait	wait = {
		.start = clock_now(),
		.timeout = timeout
	};
	SharedBuffer *shared;
	bool		loaded;
	int64		msecs;
	DrainState	state;

	check_not_ours(buffer);

	/* saved counts must be loaded before they can be flushed */
	loaded = launch_await_load(buffer->relid, LAUNCH_ALL_KEYS);
	if (!buffer_attach(buffer, false))
		return loaded ? DRAIN_DONE : DRAIN_TIMED_OUT;
	shared = buffer->shared;
	if (shared->slot.pid == MyProcPid)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("cannot drain buffer \"%s\" from its own handler",
						NameStr(buffer->name))));
	launch_ensure();
	wait.key = shared->key;
	wait.name = pstrdup(NameStr(buffer->name));
	wait.nfailures = registry_count_failures(shared);
	wait.looked_at = wait.start;
	wait.ticket = requests_ask_drain(&shared->requests);
	registry_call_worker(shared);

	if (!stopping)
		UnlockRelationOid(wait.key.relid, RowShareLock);

	/* keep the locks on row types, which other code may rely on */
	wait.locked = !stopping &&
		(has_locked(wait.key.relid, AccessShareLock) ||
		 buffer->shape->nrow_types > 0);

	ConditionVariablePrepareToSleep(&shared_control->drain_cv);
	while ((state = check_wait(&wait, &msecs)) == DRAIN_WAITING)
	{
		if (tell)
			tell_failure(&wait);
		sleep_up_to(&wait, msecs);
	}
	ConditionVariableCancelSleep();
	if (tell && state != DRAIN_DONE)
		tell_failure(&wait);
	if (state == DRAIN_DONE && !loaded)
		state = DRAIN_TIMED_OUT;
	return state;
}
