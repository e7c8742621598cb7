/*-------------------------------------------------------------------------
 *
 * recover.h
 *	  Bringing counts that only the ledger has into memory.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_RECOVER_H
#define STATBUFFER_RECOVER_H

/* What is left to do of a task of the keeper, once its transaction commits. */
typedef enum RecoverResult
{
	RECOVER_DONE,				/* nothing */
	RECOVER_MORE,				/* something, and it can be done now */
	RECOVER_LATER				/* something that must wait for others */
} RecoverResult;

/* for the keeper, each in a transaction of its own */
extern RecoverResult recover_load(void);
extern RecoverResult recover_sweep(void);
extern RecoverResult recover_rotate(void);

/* for a session that has AccessExclusiveLock on the buffer, at PRE_COMMIT */
extern void recover_settle(Oid relid);
extern void recover_buffer(Oid relid);

#endif							/* STATBUFFER_RECOVER_H */
