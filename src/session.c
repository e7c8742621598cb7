/*-------------------------------------------------------------------------
 *
 * session.c
 *	  A worker's session: cancel, timeouts, and a clean state for each flush.
 *
 * While a transaction is active, an alarm goes off several times a second.
 * Then a signal handler checks whether the transaction must end, because the
 * worker is being terminated, the buffer is being stopped, or the time of the
 * buffer's handler is up.
 *
 * The session is that of the buffer's owner, and serves one buffer of that owner
 * after another.  What a handler changes in it is reset after each flush.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_database.h"
#include "commands/prepare.h"
#include "commands/sequence.h"
#include "compat.h"
#include "miscadmin.h"
#include "owner.h"
#include "postmaster/interrupt.h"
#include "session.h"
#include "settings.h"
#include "shutdown.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/portal.h"
#include "utils/syscache.h"
#include "utils/timeout.h"

/* how often the alarm goes off during a transaction */
#define WATCH_MSECS				100

/* how long the last flush may take before the definition is known */
#define UNKNOWN_SHUTDOWN_MSECS	5000

/*
 * the role as which the process has connected, and whether that is a superuser
 */
static Oid	session_owner;
static bool was_superuser;
static bool is_known = false;

/* what follows is shared with signal handlers */
static SharedBuffer *volatile watched_buffer = NULL;	/* NULL: not ours */
static volatile sig_atomic_t watching = false;	/* in a transaction */
static volatile sig_atomic_t cancellable = false;	/* errors are caught */
static volatile sig_atomic_t cancelled = false;
static volatile sig_atomic_t halted = false;	/* by sb_stop() */
static volatile ClockTime handler_due = 0;	/* deadline of the call; 0: no
											 * limit */
static volatile int handler_msecs;
static volatile sig_atomic_t handler_timed_out = false; /* and nobody has
														 * cancelled it since */
static volatile int shutdown_msecs = UNKNOWN_SHUTDOWN_MSECS;
static volatile ClockTime stopping_since = 0;	/* 0: the worker is not being
												 * terminated */
static volatile sig_atomic_t server_stops = false;	/* and not only it */

/* ------------------------------------------------------------------------
 * Signals and timeouts
 * ------------------------------------------------------------------------
 */

/* Cancel the current query. */
static void
cancel_query(void)
{
	QueryCancelPending = true;
	InterruptPending = true;
	SetLatch(MyLatch);
}

/*
 * Somebody wants the transaction cancelled.  Remember that, to tell it from a
 * failure of the handler, which may raise the same error itself.  If the
 * handler has timed out at the same moment, the cancel counts: the time will be
 * up again with the next attempt, but nobody will cancel that.
 *
 * In this order: if the alarm goes off in between, there is a cancel.
 */
static void
cancel_transaction(void)
{
	cancelled = true;
	cancel_query();
	handler_timed_out = false;
}

/*
 * Signal handler for SIGINT.  Only user code and waiting for others can be
 * cancelled.
 */
static void
cancel_requested(SIGNAL_ARGS)
{
	int			save_errno = errno;

	if (cancellable)
		cancel_transaction();
	errno = save_errno;
}

/*
 * Cancel a call of the handler that takes longer than the option allows, unless
 * it is being cancelled anyway.
 */
static void
check_handler(ClockTime now)
{
	if (handler_due == 0 || now < handler_due)
		return;

	/* repeatedly, in case the handler catches the error and continues */
	handler_due = clock_add(now, handler_msecs);
	if (QueryCancelPending)
		return;
	handler_timed_out = true;
	cancel_query();
}

/*
 * How long the last flush may take when the server stops, in milliseconds.
 * Safe in signal handlers.
 */
int
session_shutdown_msecs(void)
{
	return Min(shutdown_msecs, statbuffer_max_shutdown);
}

/* Set the buffer's option "shutdown". */
void
session_set_shutdown(int msecs)
{
	shutdown_msecs = msecs;
}

/*
 * Get the time by which the worker must finish with its buffer, now that the
 * server stops.  All buffers' times begin with the first one's.
 */
ClockTime
session_stop_at(ClockTime now)
{
	if (stopping_since == 0)
		stopping_since = now;
	server_stops = true;
	return clock_add(stopping_since, session_shutdown_msecs());
}

/* Likewise, but 0 if it need not. */
ClockTime
session_stops_at(void)
{
	if (stopping_since == 0)
		return 0;
	return server_stops ?
		clock_add(stopping_since, session_shutdown_msecs()) : stopping_since;
}

/*
 * Check whether the transaction, which may be waiting for a lock or running
 * the handler, must end.  Called by the alarm.
 *
 * If the server stops, transactions may take as long as the last flush may.
 * If only this worker is terminated, it ends at once: a session is waiting for
 * that, in DROP DATABASE for example, and the next worker can repeat the work.
 * If the buffer is being stopped, the transaction is cancelled.
 */
static void
watch(ClockTime now)
{
	SharedBuffer *watched = watched_buffer;
	ClockTime	halt_at = 0;

	if (watched != NULL)
		halt_at = (ClockTime) pg_atomic_read_u64(&watched->requests.halt_at);
	if (cancellable && halt_at != 0 && now >= halt_at)
	{
		halted = true;
		cancel_transaction();
	}

	if (!ShutdownRequestPending)
		return;
	if (stopping_since == 0)
	{
		stopping_since = now;
		server_stops = shutdown_is_server();
	}
	if (now >= session_stops_at())
	{
		ProcDiePending = true;
		InterruptPending = true;
		SetLatch(MyLatch);
	}
}

/* Set the alarm to the time of the next check. */
static void
set_alarm(ClockTime now)
{
	ClockTime	when = clock_add(now, WATCH_MSECS);

	if (handler_due != 0)
		when = Min(when, handler_due);
	clock_alarm_by(when);
}

static void
alarm_went_off(SIGNAL_ARGS)
{
	int			save_errno = errno;

	if (watching)
	{
		ClockTime	now = clock_now();

		check_handler(now);
		watch(now);
		set_alarm(now);
	}
	errno = save_errno;
}

/* ------------------------------------------------------------------------
 * Transactions
 * ------------------------------------------------------------------------
 */

/*
 * Start a transaction that can be terminated.  With `can_cancel', it can also
 * be cancelled, because it waits for others or runs user code: the caller must
 * catch errors, and call session_end_transaction() in any case.
 *
 * This starts a transaction block, like a client's BEGIN.  Code that a handler
 * calls may check for that before it does something elsewhere: outside of a
 * block it need not wait for the commit, so it would take effect even if the
 * batch is rolled back and retried.
 */
void
session_begin_transaction(bool can_cancel)
{
	cancellable = can_cancel;
	handler_timed_out = false;
	halted = false;
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	BeginTransactionBlock();
	CommitTransactionCommand();
	StartTransactionCommand();
	watching = true;
	set_alarm(clock_now());
}

/* Commit the transaction block.  Raises an error if that fails. */
void
session_commit_transaction(void)
{
	(void) EndTransactionBlock(false);
	CommitTransactionCommand();
	watching = false;
}

/*
 * Stop watching a transaction that is about to be rolled back.  Must be called
 * with interrupts held.  Returns why it has ended.
 */
SessionEnd
session_stop_watching(void)
{
	SessionEnd	end = {
		.timed_out = handler_timed_out,
		.cancelled = cancelled,
		.halted = halted
	};

	handler_due = 0;
	watching = false;
	disable_all_timeouts(false);
	QueryCancelPending = false;
	cancelled = false;
	return end;
}

/*
 * Called after a cancellable transaction: a cancel has nothing to do any more.
 */
void
session_end_transaction(void)
{
	cancellable = false;
	cancelled = false;
	QueryCancelPending = false;
}

/* ------------------------------------------------------------------------
 * Calls of the handler
 * ------------------------------------------------------------------------
 */

/*
 * Begin a call of the handler, as the owner.  It may take up to `timeout'
 * milliseconds; 0 means no limit.
 */
void
session_begin_handler(int timeout)
{
	session_become_owner();

	/* the previous call may have timed out just after it had returned */
	session_end_handler();
	handler_timed_out = false;
	if (timeout > 0)
	{
		ClockTime	now = clock_now();

		handler_msecs = timeout;
		handler_due = clock_add(now, timeout);
		set_alarm(now);
	}
}

/*
 * The call has returned.  If it timed out at the same moment, ignore that, but
 * not a cancel by somebody else, which may come even now.
 */
void
session_end_handler(void)
{
	handler_due = 0;
	if (!handler_timed_out)
		return;
	QueryCancelPending = false;
	if (!handler_timed_out)
		QueryCancelPending = true;
}

/* ------------------------------------------------------------------------
 * The session
 * ------------------------------------------------------------------------
 */

/*
 * The process has claimed a buffer, and is its worker.  Must be called before
 * it connects to the database, and when it passes on to another buffer.
 */
void
session_begin(SharedBuffer *shared)
{
	Assert(!watching);
	watched_buffer = shared;
	shutdown_msecs = UNKNOWN_SHUTDOWN_MSECS;
	pqsignal(SIGINT, cancel_requested);
	session_end_transaction();
}

/*
 * The process has connected.  Must be called once.  Raises an error if the
 * alarm cannot be created.
 */
void
session_set_connected(void)
{
	clock_make_alarm(alarm_went_off);

	/*
	 * be the owner, even if a setting of its own or the database's is a role
	 */
	SetConfigOption("role", "none", PGC_USERSET, PGC_S_OVERRIDE);
	session_owner = GetSessionUserId();
}

/* The buffer is no longer ours: signal handlers must not access it. */
void
session_end(void)
{
	watched_buffer = NULL;
	watching = false;
}

/*
 * Could the process still connect as it has, with the same rights?  If not, it
 * must not continue with those that it has.  The caller is in a transaction.
 */
bool
session_is_valid(void)
{
	HeapTuple	tuple;
	OwnerInfo	owner;
	bool		valid;

	owner_get_info(session_owner, &owner);
	if (!is_known)
	{
		was_superuser = owner.is_superuser;
		is_known = true;
	}
	valid = owner.exists && owner.may_log_in &&
		was_superuser == owner.is_superuser;

	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(MyDatabaseId));
	if (!HeapTupleIsValid(tuple))
		return false;
	valid = valid && ((Form_pg_database) GETSTRUCT(tuple))->datallowconn;
	ReleaseSysCache(tuple);
	valid = valid && (owner.is_superuser ||
					  compat_may_connect(MyDatabaseId, session_owner));

	return valid;
}

/*
 * Go back to the owner, in case a handler has changed the role.  Resetting to
 * the value that was set when the process connected needs no catalog access.
 */
void
session_become_owner(void)
{
	if (GetSessionUserId() != session_owner)
		SetConfigOption("session_authorization", NULL, PGC_USERSET,
						PGC_S_SESSION);
	if (GetUserId() != session_owner)
		SetConfigOption("role", NULL, PGC_USERSET, PGC_S_SESSION);
}

/*
 * Undo what a handler has changed in the session.
 *
 * Each flush must find the session in the same state: a role, a search path or
 * a temporary table that was left over would affect what the next one stores,
 * and where; a lock would be held until the worker leaves.
 *
 * Returns whether there is a temporary schema.  Emptying that requires a
 * transaction and ResetTempTableNamespace().
 */
bool
session_reset(void)
{
	Oid			temp_namespace;
	Oid			toast_namespace;

	PortalHashTableDeleteAll();
	DropAllPreparedStatements();
	LockReleaseAll(USER_LOCKMETHOD, true);
	ResetSequenceCaches();
	ResetAllOptions();
	session_become_owner();
	GetTempNamespaceState(&temp_namespace, &toast_namespace);
	return OidIsValid(temp_namespace);
}
