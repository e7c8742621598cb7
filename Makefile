MODULE_big = statbuffer
OBJS = \
	src/batch.o \
	src/buffer.o \
	src/clock.o \
	src/control.o \
	src/convert.o \
	src/counters.o \
	src/create.o \
	src/ddl.o \
	src/define.o \
	src/drain.o \
	src/durable.o \
	src/fdw.o \
	src/flush.o \
	src/functions.o \
	src/hashtable.o \
	src/key.o \
	src/keeper.o \
	src/keepers.o \
	src/launch.o \
	src/launcher.o \
	src/ledger.o \
	src/load.o \
	src/move.o \
	src/options.o \
	src/owner.o \
	src/pace.o \
	src/pending.o \
	src/publish.o \
	src/queue.o \
	src/recover.o \
	src/registry.o \
	src/requests.o \
	src/save.o \
	src/savefile.o \
	src/schedule.o \
	src/session.o \
	src/settings.o \
	src/shape.o \
	src/shmem.o \
	src/shutdown.o \
	src/sink.o \
	src/sink_function.o \
	src/sink_target.o \
	src/space.o \
	src/standby.o \
	src/statbuffer.o \
	src/stats.o \
	src/sums.o \
	src/table.o \
	src/target.o \
	src/total.o \
	src/trigger.o \
	src/view.o \
	src/worker.o

EXTENSION = statbuffer
DATA = statbuffer--1.0.sql
PGFILEDESC = "statbuffer - adds up increments of hot counters"

REGRESS = setup increment default_buffer types options shape transactions \
	fdw handler flushing async startstop renamed stats privileges security overflow \
	trigger altered convert define target view durable
ISOLATION = visibility new_key flush flush_own ddl drain stop range grants trigger_rows cursor_locks \
	grow default_replaced view_updates altering
ISOLATION_OPTS = --load-extension=statbuffer
TAP_TESTS = 1
PROVE_TESTS ?= t/*.pl t/random/*.pl

# Only what is marked PGDLLEXPORT is seen outside of the library.  PGXS says so to
# the compiler since 16, and never to the one that makes bitcode.
PG_CPPFLAGS = -I$(srcdir)/src -fvisibility=hidden

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

# every source is small, and they share most of the headers
$(OBJS): $(wildcard $(srcdir)/src/*.h)
