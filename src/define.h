/*-------------------------------------------------------------------------
 *
 * define.h
 *	  What statements that define a buffer check.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_DEFINE_H
#define STATBUFFER_DEFINE_H

#include "nodes/nodes.h"
#include "nodes/pg_list.h"

/*
 * A statement that may define or alter buffers, while it runs.  One that is run
 * meanwhile, by an event trigger for example, has a watch of its own.
 */
typedef struct DefineWatch
{
	struct DefineWatch *outer;	/* or NULL */
	MemoryContext context;		/* for the list */
	List	   *tables;			/* of TouchedTable */
} DefineWatch;

extern bool define_may_alter(const Node *statement);
extern void define_begin(DefineWatch *watch);
extern void define_check(const DefineWatch *watch);
extern void define_end(const DefineWatch *watch);
extern bool define_set_quiet(bool quiet);

#endif							/* STATBUFFER_DEFINE_H */
