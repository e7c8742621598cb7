/*-------------------------------------------------------------------------
 *
 * ddl.h
 *	  Hooks on DDL that concerns our workers.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_DDL_H
#define STATBUFFER_DDL_H

#include "nodes/nodes.h"
#include "registry.h"

extern void ddl_init(void);
extern void ddl_note_made(SharedBuffer *shared);
extern bool ddl_has_altered(SharedBuffer *shared);
extern Oid	ddl_wanted_database(Node *statement, bool *force);
extern void ddl_evict(Oid dboid, bool wait);
extern void ddl_admit(Oid dboid);
extern ClockTime ddl_evicted_until(Oid dboid);

#endif							/* STATBUFFER_DDL_H */
