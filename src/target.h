/*-------------------------------------------------------------------------
 *
 * target.h
 *	  The table whose column takes the counts of a buffer.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_TARGET_H
#define STATBUFFER_TARGET_H

#include "executor/spi.h"
#include "lib/stringinfo.h"
#include "sink.h"
#include "storage/lockdefs.h"
#include "utils/relcache.h"

/* A key column, as a statement writes it. */
typedef struct TargetColumn
{
	AttrNumber	attno;			/* in the target */
	char	   *name;
	char	   *equals;			/* the operator of the unique index */
	char	   *collation;		/* " COLLATE x", or empty */
} TargetColumn;

/* The statements on a target; each has a plan that is kept. */
typedef enum TargetStatement
{
	TARGET_UPDATE,				/* add to the rows that are there */
	TARGET_INSERT,				/* insert the others */
	TARGET_SELECT				/* read what is stored for a key */
} TargetStatement;

#define TARGET_STATEMENTS	(TARGET_SELECT + 1)

/*
 * A target, as far as statements need to know it.  All names are quoted and
 * schema-qualified, so that they mean the same on any search path.
 *
 * It is valid to the end of the transaction: if it is described anew, because
 * the table or the buffer was altered, the old description is kept as long, for
 * callers that are using it while user code runs.
 */
typedef struct Target
{
	Oid			relid;
	char	   *name;
	TargetColumn *keys;			/* in the order of the buffer's columns */
	int			nkeys;
	AttrNumber	count_attno;
	char	   *count;			/* the count column's name */
	bool		nulls_equal;	/* two nulls are the same key */
	bool		distributed;	/* by Citus */
	bool		update_first;	/* an INSERT could do something else to a row
								 * that is there than an UPDATE */

	MemoryContext context;		/* that holds all this */
	SPIPlanPtr	plans[TARGET_STATEMENTS];	/* NULL: not made yet */

	int			alike;			/* sink_target.c: for so many batches, keys
								 * are taken to be new; if negative, to have
								 * rows */
} Target;

extern List *target_find_key(Relation rel);
extern char *target_name(Oid relid);
extern char *target_collation(Oid collation);
extern Target *target_open(const SinkSource *source, bool is_owner,
						   LOCKMODE lockmode);
extern void target_check_privileges(const Target *target, Oid owner);
extern void target_note_defaults(const Target *target);
extern char *target_key_names(const Target *target);
extern void target_append_condition(StringInfo statement, const Target *target,
									const char *keys, const bool *isnull);
extern void target_report_duplicate(void);
extern SPIPlanPtr target_prepare(const Target *target, const char *statement,
								 int nargs, Oid *argtypes);
extern void target_keep(Target *target, TargetStatement statement,
						SPIPlanPtr plan);
extern void target_check_plan(const Target *target, SPIPlanPtr plan);
extern SPIPlanPtr target_plan(Target *target, TargetStatement statement);

#endif							/* STATBUFFER_TARGET_H */
