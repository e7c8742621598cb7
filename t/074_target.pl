# Buffers that store their counts in a column of a table.  sb_total() is exact
# at every moment: while flushes commit, fail and are broken off, while others
# change the same rows, and in old snapshots.  And the plan that a worker keeps
# stays a good one when the table grows.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $node = new_node('target', 'statbuffer.max_workers = 4', q{shared_preload_libraries = 'statbuffer'});

sql(q{
	CREATE TABLE pages (path text PRIMARY KEY, views bigint NOT NULL DEFAULT 0, other int);
	SELECT sb_create('hits', 'pages', 'views', 'interval=1ms', 'backoff=1ms');

	-- All of these go on until there is a row here.
	CREATE TABLE stop ();
	CREATE TABLE counted (own text, n bigint);

	-- count one, again and again, and see after each commit that it is there
	CREATE PROCEDURE count_and_read(own text) LANGUAGE plpgsql AS $$
	DECLARE
		n bigint := 0;
		total bigint;
		last_total bigint := 0;
	BEGIN
		WHILE NOT EXISTS (SELECT FROM stop) LOOP
			INSERT INTO hits VALUES (own, 1), ('shared', 1);
			COMMIT;
			n := n + 1;
			total := sb_total(own, 'hits');
			IF total <> n THEN
				RAISE '% has a total of %, after % increments', own, total, n;
			END IF;
			total := sb_total('shared', 'hits');
			IF total < last_total OR total < n THEN
				RAISE 'the shared total went from % to %, after % increments', last_total, total, n;
			END IF;
			last_total := total;
			COMMIT;
		END LOOP;
		INSERT INTO counted VALUES (own, n);
	END $$;

	-- the same from transactions with an old snapshot: it never goes down
	CREATE PROCEDURE read_only() LANGUAGE plpgsql AS $$
	DECLARE
		total bigint;
		last_total bigint := 0;
	BEGIN
		WHILE NOT EXISTS (SELECT FROM stop) LOOP
			COMMIT;
			SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY;
			PERFORM FROM pages;
			FOR i IN 1 .. 50 LOOP
				total := sb_total('shared', 'hits');
				IF total < last_total THEN
					RAISE 'the total went from % to %', last_total, total;
				END IF;
				last_total := total;
			END LOOP;
			COMMIT;
		END LOOP;
	END $$;

	-- others change the same rows, and make them; workers are terminated
	CREATE PROCEDURE meddle() LANGUAGE plpgsql AS $$
	DECLARE
		n int := 0;
	BEGIN
		WHILE NOT EXISTS (SELECT FROM stop) LOOP
			n := n + 1;
			-- a row at a time: several, in another order than a flush, might deadlock with it
			UPDATE pages SET other = n WHERE path = 'shared';
			COMMIT;
			UPDATE pages SET other = n WHERE path = 'one';
			COMMIT;
			UPDATE pages SET other = n WHERE path = 'two';
			COMMIT;
			INSERT INTO pages VALUES ('two', 0) ON CONFLICT DO NOTHING;
			COMMIT;
			IF n % 100 = 0 THEN
				PERFORM pg_terminate_backend(pid) FROM sb_stat_buffers WHERE buffer = 'hits';
			END IF;
			PERFORM pg_sleep(0.01);
			COMMIT;
		END LOOP;
	END $$;

	-- one of twenty flushes fails
	CREATE FUNCTION fail_sometimes() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF random() < 0.05 THEN
			RAISE 'bad luck';
		END IF;
		RETURN NULL;
	END $$;
	CREATE CONSTRAINT TRIGGER fail_sometimes AFTER UPDATE OF views ON pages DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION fail_sometimes();
});

#
# Four sessions count and read, one reads, one meddles
#
my @sessions = map { start_session($node, 'postgres', "CALL count_and_read('$_')") } qw(one two three four);
push @sessions, start_session($node, 'postgres', 'CALL read_only()');
push @sessions, start_session($node, 'postgres', 'CALL meddle()');
my $flushes = sized(300, 20);
wait_for($node, 'postgres', qq{
	SELECT handler_calls >= $flushes AND failures >= 3 FROM sb_stat_buffers WHERE buffer = 'hits'},
	'there were many flushes, and some failed');
sql('INSERT INTO stop DEFAULT VALUES');
finish_session($_, 'each total was exact') for @sessions;
my $counted = q{SELECT string_agg(own || ' ' || n, ', ' ORDER BY own = 'shared', own)
	FROM (TABLE counted UNION ALL SELECT 'shared', sum(n) FROM counted) c};
my $sums = sql($counted);
is(sql(q{SELECT string_agg(k || ' ' || sb_total(k, 'hits'), ', ' ORDER BY k = 'shared', k)
	FROM unnest('{one,two,three,four,shared}'::text[]) k}), $sums, 'exact in the end');
sql('DROP TRIGGER fail_sometimes ON pages');
is(sql(q{SELECT sb_drain('hits')}), 't', 'drained');
is(sql(q{SELECT string_agg(path || ' ' || views, ', ' ORDER BY path = 'shared', path) FROM pages}),
	$sums, 'all is stored, once');
my $n = sql(q{SELECT n FROM counted WHERE own = 'one'});

#
# What is stored and not committed yet, and what is committed and still in
# flight, is counted once: the worker is kept in the middle of its commit.
#
sql(q{
	ALTER FOREIGN TABLE hits OPTIONS (SET interval '1h');
	CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_advisory_xact_lock_shared(4713);
		RETURN NULL;
	END $$;
	CREATE CONSTRAINT TRIGGER wait_at_gate AFTER INSERT OR UPDATE ON pages DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION wait_at_gate();
});
my $gate = close_gate($node, 'postgres');
sql(q{INSERT INTO hits VALUES ('one', 5), ('new', 7)});
sql(q{SELECT sb_flush_all('hits')});
wait_at_gate($node, 'postgres', 'hits');
is(sql(q{SELECT views, sb_total('one', 'hits'), sb_total('new', 'hits') FROM pages WHERE path = 'one'}),
	"$n|" . ($n + 5) . '|7', 'stored but not committed');
sql(q{INSERT INTO hits VALUES ('one', 1)});
is(sql(q{SELECT sb_total('one', 'hits')}), $n + 6, 'counted while it is in flight');
is(sql(q{SELECT count, in_flight FROM sb_keys('hits') WHERE key = 'one'}), '1|5', 'as sb_keys() shows it');
open_gate($gate);
is(sql(q{SELECT sb_drain('hits')}), 't', 'drained');
is(sql(q{SELECT views FROM pages WHERE path = 'one'}), $n + 6, 'stored');
sql('DROP TRIGGER wait_at_gate ON pages');

#
# Another table gets the name while the flush and a session wait for the lock:
# the name means the new one then.
#
sql(q{
	CREATE TABLE swapped (key text PRIMARY KEY, n bigint);
	CREATE TABLE swapped_new (LIKE swapped INCLUDING ALL);
	INSERT INTO swapped VALUES ('x', 100);
	SELECT sb_create('swap', 'swapped', 'n', 'interval=1h');

	CREATE FUNCTION wait_for_swap() RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		WHILE NOT EXISTS (SELECT FROM pg_locks WHERE relation = 'swapped'::regclass AND mode = 'AccessExclusiveLock') LOOP
			PERFORM pg_sleep(0.01);
		END LOOP;
	END $$;
});
my $reader = start_session($node, 'postgres', q{SELECT 'total ' || sb_total('x', 'swap')},
	'SELECT wait_for_swap() IS NULL', q{SELECT 'total ' || sb_total('x', 'swap')});
wait_for_session($reader, q{query LIKE '%wait_for_swap%'}, 'a session has read the total');
my $swap = $node->background_psql('postgres');
$swap->query_safe(q{
	BEGIN;
	ALTER TABLE swapped RENAME TO swapped_old;
	ALTER TABLE swapped_new RENAME TO swapped;
});
sql(q{INSERT INTO swap VALUES ('x', 5); SELECT sb_flush_all('swap')});
wait_for_session($reader, q{l.locktype = 'relation'}, 'it waits for the table');
wait_for($node, 'postgres', q{
	SELECT EXISTS (SELECT FROM pg_stat_activity JOIN pg_locks USING (pid)
		WHERE backend_type = 'statbuffer worker' AND locktype = 'relation' AND NOT granted)}, 'so does the flush');
$swap->query_safe('COMMIT');
$swap->quit;
finish_session($reader, 'the session goes on');
like($reader->{out}, qr/^total 100\n.*^total 5$/ms, 'and reads the total of the new table');
is(sql(q{SELECT sb_drain('swap')}), 't', 'drained');
is(sql('SELECT (SELECT n FROM swapped), (SELECT n FROM swapped_old)'), '5|100', 'it was stored in the new table');
sql(q{ALTER TABLE swapped RENAME TO swapped_view; CREATE VIEW swapped AS TABLE swapped_view});
like(error_of(q{SELECT sb_total('x', 'swap')}), qr/target "swapped" is not a table/, 'a view has taken its name');
sql('DROP VIEW swapped; ALTER TABLE swapped_view RENAME TO swapped');

#
# A total that takes longer to read than a flush comes to an end all the same.
#
sql(q{
	CREATE TABLE slow (key text PRIMARY KEY, n bigint);
	INSERT INTO slow VALUES ('x', 1);
	CREATE ROLE reader;
	GRANT SELECT ON slow TO reader;
	ALTER TABLE slow ENABLE ROW LEVEL SECURITY;
	CREATE POLICY slowly ON slow USING (pg_sleep(0.1) IS NOT NULL);
	SELECT sb_create('slow_counts', 'slow', 'n', 'interval=0', 'batch_size=1');
	GRANT SELECT ON slow_counts TO reader;
	TRUNCATE stop;
	CREATE PROCEDURE count_on() LANGUAGE plpgsql AS $$
	BEGIN
		WHILE NOT EXISTS (SELECT FROM stop) LOOP
			INSERT INTO slow_counts (key) SELECT 'y' || i FROM generate_series(1, 20) i;
			COMMIT;
		END LOOP;
	END $$;
});
my $counter = start_session($node, 'postgres', 'CALL count_on()');
wait_for($node, 'postgres', q{SELECT handler_calls > 20 FROM sb_stat_buffers WHERE buffer = 'slow_counts'},
	'flushes follow each other');
is(sql(q{SET ROLE reader; SELECT sb_total('x', 'slow_counts')}), 1, 'a total is read meanwhile');
sql('INSERT INTO stop DEFAULT VALUES');
finish_session($counter, 'counted');
is(sql(q{SELECT sb_drain('slow_counts')}), 't', 'drained');

#
# A plan that was made for an empty table finds each key by the index when the
# table has grown, whatever the planner would do now.
#
sql(q{
	CREATE TABLE growing (key int PRIMARY KEY, n bigint);
	VACUUM ANALYZE growing;
	SELECT sb_create('grow', 'growing', 'n', 'interval=1h', 'timeout=1h');
	INSERT INTO grow VALUES (0, 1);
	SELECT sb_drain('grow');
	ALTER TABLE growing SET (autovacuum_enabled = off);
	INSERT INTO grow VALUES (0, 1);
	SELECT sb_drain('grow');
});
my $rows = sized(20000, 2000);
sql("INSERT INTO growing SELECT i, 0 FROM generate_series(1, $rows) i");
sql(q{SELECT pg_stat_reset_single_table_counters('growing'::regclass)});
my $pid = worker_of($node, 'postgres', 'grow');
sql("INSERT INTO grow SELECT i, 1 FROM generate_series(0, $rows) i; SELECT sb_drain('grow')");
is(sql('SELECT sum(n), count(*) FROM growing'), ($rows + 3) . '|' . ($rows + 1), 'stored in the large table');
is(worker_of($node, 'postgres', 'grow'), $pid, 'by the same worker');
sql(q{SELECT sb_stop('grow')});
wait_for_no_worker($node, 'stopped');
is(sql(q{SELECT seq_scan <= 1 AND idx_scan >= } . $rows . q{ FROM pg_stat_user_tables WHERE relname = 'growing'}),
	't', 'and each key was looked up in the index')
  or diag(sql(q{SELECT seq_scan, seq_tup_read, idx_scan, idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'growing'}));

#
# A session that reads the totals of more buffers than it keeps statements for
#
sql(q{
	DO $$
	BEGIN
		FOR i IN 1 .. 70 LOOP
			PERFORM sb_create('more_' || i, 'growing', 'n', 'interval=1h');
		END LOOP;
	END $$;
	INSERT INTO more_1 VALUES (0, 5);
	INSERT INTO more_70 VALUES (0, 7);
});
is(sql(q{
	SELECT sum(sb_total(0, ('more_' || i)::regclass)) FROM generate_series(1, 70) i
}), 70 * 3 + 12, 'the totals of 70 buffers');
is(sql(q{
	DO $$
	BEGIN
		FOR i IN 1 .. 70 LOOP
			PERFORM sb_total(0, ('more_' || i)::regclass);
			ALTER TABLE growing RENAME n TO m;
			BEGIN
				PERFORM sb_total(0, ('more_' || i)::regclass);
				RAISE 'there is no such column';
			EXCEPTION WHEN undefined_column THEN
			END;
			ALTER TABLE growing RENAME m TO n;
		END LOOP;
	END $$;
	SELECT sb_total(0, 'more_70')
}), 10, 'and of buffers whose target is altered again and again');

has_not_crashed($node, 'no process has crashed');
done_testing();
