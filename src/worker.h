/*-------------------------------------------------------------------------
 *
 * worker.h
 *	  Declarations shared by workers and the launcher.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_WORKER_H
#define STATBUFFER_WORKER_H

/*
 * A worker is started this long before the first key is due, and one without
 * work for longer than that may leave.
 */
#define LAUNCHER_LEAD_MSECS		5000

/* The argument of a worker, in BackgroundWorker.bgw_extra. */
typedef struct WorkerArgument
{
	Oid			dboid;
	Oid			relid;
	Oid			owner;			/* InvalidOid: only check who it is */
	bool		look_for_dropped;	/* look for dropped buffers first */
} WorkerArgument;

extern PGDLLEXPORT void statbuffer_worker_main(Datum main_arg);

#endif							/* STATBUFFER_WORKER_H */
