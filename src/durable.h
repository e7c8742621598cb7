/*-------------------------------------------------------------------------
 *
 * durable.h
 *	  Durable buffers: their epochs, and switching "durable" on and off.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_DURABLE_H
#define STATBUFFER_DURABLE_H

#include "buffer.h"
#include "ledger.h"

extern void durable_init(void);
extern bool durable_has_epochs(Oid relid);
extern void durable_before_drop(const Node *statement);
extern uint64 durable_epoch(SbBuffer *buffer, const KeyShape *shape);
extern void durable_truncate(SbBuffer *buffer);
extern void durable_commit_prepared(void);
extern void durable_note_options(void);
extern bool durable_is_unsettled(const SbBuffer *buffer);
extern void durable_reconcile(bool preparing);

#endif							/* STATBUFFER_DURABLE_H */
