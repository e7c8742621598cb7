# What of ours can fail when a transaction commits fails before others do what
# they cannot take back: postgres_fdw has the transactions on other servers
# commit in the same callback.  Whichever library was loaded first, and whatever
# the transaction did first.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use TestLibrary;

my $db = 'postgres';
my $large = '2305843009213693952';    # 2^61

# How a transaction counts and sends a row.  Each is tried in a session of its
# own, in which postgres_fdw has not been connected yet.
my %ways = (
	'sent, then counted' => 'BEGIN; INSERT INTO there VALUES ($WHAT$); $COUNT$; COMMIT',
	'counted, then sent' => 'BEGIN; $COUNT$; INSERT INTO there VALUES ($WHAT$); COMMIT',
	'counted in a savepoint' => 'BEGIN; SAVEPOINT s; $COUNT$; RELEASE s; INSERT INTO there VALUES ($WHAT$); COMMIT',
	'after many savepoints' => 'BEGIN; $COUNT$; DO $$ BEGIN
		FOR i IN 1 .. 50 LOOP BEGIN PERFORM 1; EXCEPTION WHEN others THEN END; END LOOP; END $$; '
	  . join('', map { "SAVEPOINT s$_; " } 1 .. 40) . 'INSERT INTO there VALUES ($WHAT$); COMMIT',
	'in one statement' => 'DO $$ BEGIN PERFORM $CALL$; INSERT INTO there VALUES ($WHAT$); END $$',
	'to a partition' => 'DO $$ BEGIN PERFORM $CALL$; INSERT INTO parts VALUES ($WHAT$); END $$',
	'committed by the statement' => 'DO $$ BEGIN PERFORM $CALL$; INSERT INTO there VALUES ($WHAT$); COMMIT; END $$',
	'after many others' => 'DO $$ BEGIN PERFORM $CALL$;
		FOR i IN 1 .. 50 LOOP PERFORM FROM there WHERE what = i::text; END LOOP;
		INSERT INTO there VALUES ($WHAT$); END $$');

# What fails when it is committed.
my %failures = (
	'out of range' => [ "sb_increment('large', $large, 'hits')", qr/out of range|limit|too large/ ],
	'out of memory' => [ q{count_too_many()}, qr/out of memory for keys of buffer "small"/ ],
	'altered' => [ q{count_and_alter()}, qr/key columns of buffer "altered" were changed by the transaction/ ]);

sub test_order
{
	my ($how, @settings) = @_;
	my $node = new_node($how, 'max_connections = 50', @settings);
	my $sql = sub { return $node->safe_psql($db, $_[0]) };

	$sql->(sprintf q{
		CREATE EXTENSION postgres_fdw;
		CREATE SERVER self FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '%s', port '%s', dbname '%s');
		CREATE USER MAPPING FOR CURRENT_USER SERVER self;
		CREATE TABLE here (what text);
		CREATE FOREIGN TABLE there (what text) SERVER self OPTIONS (table_name 'here');
		CREATE TABLE parts (what text) PARTITION BY LIST (what);
		CREATE FOREIGN TABLE part PARTITION OF parts DEFAULT SERVER self OPTIONS (table_name 'here');
		CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$;
		CREATE FOREIGN TABLE hits (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h', backoff '1h');
		CREATE FOREIGN TABLE altered (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h', backoff '1h');
		CREATE FOREIGN TABLE small (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '100ms', backoff '1h', max_memory '64kB');
		CREATE FUNCTION count_too_many() RETURNS bigint LANGUAGE sql AS $$
			SELECT count(sb_increment('new ' || g, 1, 'small')) FROM generate_series(1, 1000) g
		$$;
		CREATE FUNCTION count_and_alter() RETURNS void LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM sb_increment('k', 1, 'altered');
			ALTER FOREIGN TABLE altered ALTER key TYPE varchar(99);
		END
		$$;
		CREATE TABLE rows (what text);
		CREATE FUNCTION send() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO there VALUES (new.what);
			RETURN new;
		END
		$$;
		CREATE TRIGGER a_count AFTER INSERT ON rows FOR EACH ROW EXECUTE FUNCTION sb_trigger('small', 'what');
		CREATE TRIGGER b_send AFTER INSERT ON rows FOR EACH ROW EXECUTE FUNCTION send();
	}, $node->host, $node->port, $db);

	# A key that holds so much that it cannot take as much again.
	$node->psql($db, "SELECT sb_increment('large', $large, 'hits')");
	$sql->("SELECT sb_increment('held', 1, 'hits')");

	# There is room for a key, so that it is the commit that fails, and not the
	# call: what the last one had made is given back a little later.
	my $empty = sub {
		$node->poll_query_until($db, q{SELECT coalesce(sum(keys), 0) = 0 FROM sb_stat_buffers WHERE buffer = 'small'})
		  or die 'memory does not get free';
	};

	my $n = 0;
	my $held = 1;
	foreach my $failure (sort keys %failures)
	{
		my ($call, $message) = @{ $failures{$failure} };

		foreach my $way (sort keys %ways)
		{
			my $what = "'" . ++$n . "'";
			my $statements = $ways{$way};
			my $good = 'BEGIN; INSERT INTO there VALUES ($WHAT$ || \' good\'); SELECT sb_increment(\'held\', 1, \'hits\'); COMMIT';

			foreach ($statements, $good)
			{
				s/\$WHAT\$/$what/g;
				s/\$CALL\$/$call/g;
				s/\$COUNT\$/SELECT $call/g;
			}
			$empty->() if $failure eq 'out of memory';
			my ($status, $out, $stderr) = $node->psql($db, "$statements;\n$good;", on_error_stop => 0);
			like($stderr, $message, "$how, $failure, $way: fails");
			unlike($stderr, qr/function "?count_too_many/, "$how, $failure, $way: at the commit");
			is($sql->("SELECT string_agg(what, ',') FROM here WHERE what LIKE $what || '%'"),
				"$n good", "$how, $failure, $way: nothing was sent; the next transaction's was");
			$held++;
		}
	}
	is($sql->(q{SELECT count FROM hits WHERE key = 'held'}), $held, "$how: and counted");

	# Triggers that count and send, in this order
	$empty->();
	my ($status, $out, $stderr) = $node->psql($db, q{INSERT INTO rows SELECT 'by trigger ' || g FROM generate_series(1, 1000) g});
	like($stderr, qr/out of memory for keys of buffer "small"/, "$how, triggers: fails");
	unlike($stderr, qr/CONTEXT/, "$how, triggers: at the commit");
	is($sql->(q{SELECT (SELECT count(*) FROM here WHERE what LIKE 'by trigger%'), (SELECT count(*) FROM rows)}),
		'0|0', "$how, triggers: nothing was sent");
	$empty->();
	$sql->(q{INSERT INTO rows VALUES ('held')});
	is($sql->(q{SELECT (SELECT count(*) FROM here WHERE what = 'held'), (SELECT count(*) FROM rows)}),
		'1|1', "$how, triggers: what can be counted is sent");

	# PREPARE is refused before anything is sent, as it was.
	($status, $out, $stderr) = $node->psql($db, q{BEGIN; INSERT INTO there VALUES ('prepared');
		SELECT sb_increment('held', 1, 'hits'); PREPARE TRANSACTION 'x'});
	like($stderr, qr/cannot PREPARE a transaction/, "$how: PREPARE is refused");
	is($sql->(q{SELECT count(*) FROM here WHERE what = 'prepared'}), '0', "$how: and nothing sent");

	# A session is terminated while it commits a great many keys: it was either
	# before or after the commit, here and there.
	$sql->(q{TRUNCATE hits});
	my ($committed, $rolled_back) = (0, 0);
	foreach my $i (1 .. 6)
	{
		my ($in, $psql_out, $psql_err) = (qq{SET application_name = 'victim';
			BEGIN;
			SELECT count(sb_increment('$i ' || k, 1, 'hits')) FROM generate_series(1, 100000) k;
			INSERT INTO there VALUES ('victim $i');
			COMMIT;
		}, '', '');
		my $victim = IPC::Run::start(
			[ 'psql', '-XqAt', '-d', $node->connstr($db) ], '<', \$in, '>', \$psql_out, '2>', \$psql_err);

		$sql->(sprintf q{DO $$
			DECLARE
				victim int;
			BEGIN
				LOOP
					PERFORM pg_stat_clear_snapshot();
					SELECT pid INTO victim FROM pg_stat_activity WHERE application_name = 'victim' AND query LIKE 'COMMIT%%' AND state = 'active';
					EXIT WHEN FOUND OR NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'victim'
						AND backend_start < clock_timestamp() - interval '%s');
				END LOOP;
				PERFORM pg_sleep(%s), pg_terminate_backend(victim);
			END $$}, $patience, ($i - 1) * 0.01);
		$victim->finish;
		wait_for($node, $db, q{SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'victim')}, "$how: a session is terminated");
		my $seen = $sql->(qq{SELECT (SELECT count(*) FROM here WHERE what = 'victim $i'), count(*) FROM hits WHERE key LIKE '$i %'});
		like($seen, qr/^(0\|0|1\|100000)$/, "$how: counted and sent, or neither");
		$seen eq '0|0' ? $rolled_back++ : $committed++;
	}
	note("$committed committed, $rolled_back rolled back");
	$node->stop;
}

test_order('preloaded', q{shared_preload_libraries = 'statbuffer'});
test_order('not_preloaded');

# --- who counts when it is too late -----------------------------------------

SKIP:
{
	skip 'nothing to build a library with', 1 unless can_build_library();

	# Another library's callback runs statements when a transaction commits.
	my $late = build_library('late', q{
		#include "postgres.h"
		#include "access/xact.h"
		#include "executor/spi.h"
		#include "fmgr.h"
		#include "utils/snapmgr.h"

		PG_MODULE_MAGIC;

		extern PGDLLEXPORT void _PG_init(void);
		extern PGDLLEXPORT Datum late(PG_FUNCTION_ARGS);
		static bool wanted = false;

		static void
		callback(XactEvent event, void *arg)
		{
			if (event != XACT_EVENT_PRE_COMMIT || !wanted)
				return;
			wanted = false;
			PushActiveSnapshot(GetTransactionSnapshot());
			SPI_connect();
			SPI_execute("SELECT sb_increment('late', 1, 'hits')", false, 0);
			SPI_execute("SELECT FROM there", false, 0);
			SPI_finish();
			PopActiveSnapshot();
		}

		void
		_PG_init(void)
		{
			RegisterXactCallback(callback, NULL);
		}

		PG_FUNCTION_INFO_V1(late);
		Datum
		late(PG_FUNCTION_ARGS)
		{
			wanted = true;
			PG_RETURN_VOID();
		}
	});
	foreach my $preload ("$late,statbuffer", "statbuffer,$late")
	{
		my $first = $preload =~ /^statbuffer/ ? 'statbuffer' : 'other';
		my $node = new_node("late_$first", "shared_preload_libraries = '$preload'");
		my $how = "$first first";

		make_buffer($node, $db, 'hits', q{interval '1h', timeout '1h'});
		$node->safe_psql($db, sprintf q{
			CREATE FUNCTION late() RETURNS void LANGUAGE c AS '%s';
			CREATE EXTENSION file_fdw;
			CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
			CREATE FOREIGN TABLE there (what text) SERVER files OPTIONS (program 'true');
		}, $late);

		# Not lost: it is counted, or an error.
		my ($status, $out, $err) = $node->psql($db, q{SELECT late()});
		my $counted = $node->safe_psql($db, q{SELECT coalesce(sum(count), 0) FROM hits});
		if ($first eq 'statbuffer')
		{
			is("$status$err$counted", '01', "$how: what is counted before our callback is called is counted");
		}
		else
		{
			like($err, qr/cannot change buffer "hits" while the transaction commits/, "$how: what is counted after it is an error");
			is($counted, '0', "$how: and not counted");
		}
		($status, $out, $err) = $node->psql($db, q{BEGIN; SELECT sb_increment('k', 1, 'hits'), late(); COMMIT});
		like($err, qr/cannot change buffer "hits" while the transaction commits/, "$how: also when the transaction has counted before");
		is($node->safe_psql($db, q{SELECT coalesce(sum(count), 0) FROM hits}), $counted, "$how: all of it is rolled back");
		is($node->safe_psql($db, q{SELECT sb_increment('k', 1, 'hits'); SELECT sum(count) FROM hits}), "1\n" . ($counted + 1), "$how: and counting goes on");
		$node->stop;
	}
}

done_testing();
