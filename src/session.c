/*-------------------------------------------------------------------------
 *
 * session.c
 *	  A worker's session: cancel, timeouts, and a clean state for each flush.
 *
 * While a transaction is active, an alarm goes off several times a second, and
 * its handler looks whether the transaction has to end: because the worker was
 * told to leave, the buffer is being stopped, or the handler's time is up.
 *
 * The session is that of the buffer's owner.  What a handler changes in it is
 * reset after each flush.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "commands/prepare.h"
#include "commands/sequence.h"
#include "compat.h"
#include "miscadmin.h"
#include "postmaster/interrupt.h"
#include "session.h"
#include "shutdown.h"
#include "statbuffer.h"
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

/* the role as which the process has connected, and whether it was a superuser */
static Oid	session_owner;
static bool was_superuser;
static bool is_known = false;

/* what follows is shared with signal handlers */
static SharedBuffer *volatile watched_buffer = NULL;	/* NULL: not ours */
static volatile sig_atomic_t watching = false;	/* in a transaction */
static volatile sig_atomic_t cancellable = false;	/* errors are caught */
static volatile sig_atomic_t cancelled = false;
static volatile ClockTime handler_due = 0;	/* must be back by then; 0: no
											 * limit */
static volatile int handler_msecs;
static volatile sig_atomic_t handler_timed_out = false;
static volatile int shutdown_msecs = UNKNOWN_SHUTDOWN_MSECS;
static volatile ClockTime stop_at = 0;	/* 0: the worker was not told to end */

/* ------------------------------------------------------------------------
 * Signals and timeouts
 * ------------------------------------------------------------------------
 */

/* Have the transaction raise the error of a cancelled query. */
static void
cancel_query(void)
{
	QueryCancelPending = true;
	InterruptPending = true;
	SetLatch(MyLatch);
}

/*
 * Handler of SIGINT.  A cancel is not the handler's failure, which may raise
 * the same error by itself.  Only the user's code can be cancelled, and waiting
 * for others.
 */
static void
cancel_requested(SIGNAL_ARGS)
{
	if (!cancellable)
		return;
	cancelled = true;
	StatementCancelHandler(COMPAT_PASS_SIGNAL_ARGS);
}

/* Cancel a call of the handler that takes longer than the option allows. */
static void
check_handler(ClockTime now)
{
	if (handler_due == 0 || now < handler_due)
		return;

	/* again and again, for a handler that catches the error and goes on */
	handler_due = clock_add(now, handler_msecs);
	handler_timed_out = true;
	cancel_query();
}

/*
 * How long the last flush may take when the server stops, in milliseconds.
 * Called by signal handlers, too.
 */
int
session_shutdown_msecs(void)
{
	return Min(shutdown_msecs, statbuffer_max_shutdown);
}

/* Set the buffer's option. */
void
session_set_shutdown(int msecs)
{
	shutdown_msecs = msecs;
}

/* When the worker must end its work, now that the server stops. */
ClockTime
session_stop_at(ClockTime now)
{
	if (stop_at == 0)
		stop_at = clock_add(now, session_shutdown_msecs());
	return stop_at;
}

/*
 * Periodic alarm handler, active during transactions, which may wait for a lock
 * or for a handler.
 *
 * When the server stops, transactions have as long as the last flush may take.
 * When only this worker is told to end, it ends at once: somebody waits for it,
 * DROP DATABASE for example, and the next worker can do it all again.  When the
 * buffer is being stopped, the transaction is cancelled.
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
		cancelled = true;
		cancel_query();
	}

	if (!ShutdownRequestPending)
		return;
	if (stop_at == 0)
	{
		stop_at = now;
		if (shutdown_is_server())
			stop_at = clock_add(now, session_shutdown_msecs());
	}
	if (now >= stop_at)
	{
		ProcDiePending = true;
		InterruptPending = true;
		SetLatch(MyLatch);
	}
}

/* Set the alarm for when there is something to look at next. */
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
 * Start a transaction that can be ended from outside.  If `cancellable', it can
 * also be cancelled, because it waits for others or runs the user's function:
 * the caller catches errors, and calls session_end_transaction() in any case.
 *
 * It is a transaction block, as a client's statements between BEGIN and COMMIT
 * are.  Code that a handler calls may ask for that before it does something
 * elsewhere: what does not seem to be in a block need not wait for the commit,
 * and would be done even if the batch is rolled back and comes again.
 */
void
session_begin_transaction(bool can_cancel)
{
	cancellable = can_cancel;
	handler_timed_out = false;
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	BeginTransactionBlock();
	CommitTransactionCommand();
	StartTransactionCommand();
	watching = true;
	set_alarm(clock_now());
}

void
session_commit_transaction(void)
{
	(void) EndTransactionBlock(false);
	CommitTransactionCommand();
	watching = false;
}

/*
 * Before a transaction is rolled back, with interrupts held: nothing watches it
 * any more.  Returns what has ended it.
 */
SessionEnd
session_stop_watching(void)
{
	SessionEnd	end = {.timed_out = handler_timed_out,.cancelled = cancelled};

	handler_due = 0;
	watching = false;
	disable_all_timeouts(false);
	QueryCancelPending = false;
	cancelled = false;
	return end;
}

/* After a cancellable transaction: nothing is running that could be cancelled. */
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
 * A call of the handler begins, as the owner.  It may take `timeout'
 * milliseconds, or with 0, any time.
 */
void
session_begin_handler(int timeout)
{
	session_become_owner();

	/* the time of the call before may have run out when it had returned */
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
 * The call has returned.  If that was just when its time was up, the cancel
 * does not count.
 */
void
session_end_handler(void)
{
	handler_due = 0;
	if (handler_timed_out)
		QueryCancelPending = false;
}

/* ------------------------------------------------------------------------
 * The session
 * ------------------------------------------------------------------------
 */

/*
 * The process has claimed a buffer, and is its worker.  To be called before
 * it connects to the database.
 */
void
session_begin(SharedBuffer *shared)
{
	watched_buffer = shared;
	pqsignal(SIGINT, cancel_requested);
	session_end_transaction();
}

/* The process is connected. */
void
session_set_connected(void)
{
	clock_make_alarm(alarm_went_off);

	/* the owner, also if its own settings or the database's say another role */
	SetConfigOption("role", "none", PGC_USERSET, PGC_S_OVERRIDE);
	session_owner = GetSessionUserId();
}

/* The buffer is not ours any more: signal handlers must not touch it. */
void
session_end(void)
{
	watched_buffer = NULL;
	watching = false;
}

/*
 * Could the process connect as it did when it started, and with the same
 * rights?  If not, it must not go on with those that it has.
 */
bool
session_is_valid(void)
{
	HeapTuple	tuple;
	bool		is_superuser;
	bool		valid;

	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(session_owner));
	if (!HeapTupleIsValid(tuple))
		return false;
	valid = !COMPAT_OWNER_NEEDS_LOGIN ||
		((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
	is_superuser = ((Form_pg_authid) GETSTRUCT(tuple))->rolsuper;
	ReleaseSysCache(tuple);
	if (!is_known)
	{
		was_superuser = is_superuser;
		is_known = true;
	}
	valid = valid && was_superuser == is_superuser;

	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(MyDatabaseId));
	if (!HeapTupleIsValid(tuple))
		return false;
	valid = valid && ((Form_pg_database) GETSTRUCT(tuple))->datallowconn;
	ReleaseSysCache(tuple);
	valid = valid && (is_superuser ||
					  compat_may_connect(MyDatabaseId, session_owner));

	return valid;
}

/*
 * Whatever role a handler has taken on, the next call begins as the owner.
 * Back to what was set when the process connected: that reads no catalogs.
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
 * A handler can change the session that it runs in.  Each flush must find it as
 * the first one did: a role, a search path or a temporary table that was left
 * there would decide what the next one stores, and where; a lock would be held
 * until the worker leaves.
 *
 * Returns whether there is a temporary schema, which takes a transaction and
 * ResetTempTableNamespace() to empty.
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
