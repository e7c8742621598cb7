# What the sessions of the chaos test do in the world of ChaosWorld.pm: scripts
# for pgbench and psql.

package ChaosScripts;

use strict;
use warnings;

use ChaosWorld;
use Exporter 'import';

our @EXPORT = qw(calm_scripts rough_script trouble_script);

# Scripts for pgbench, each with its weight.  These sessions are left alone,
# and no statement of theirs may fail.
sub calm_scripts
{
	my $attempt = 'LOCK TABLE ledger IN ROW EXCLUSIVE MODE;'
	  . " SELECT nextval('begun_' || :k::int), sb_async_increment(:k::int, 1, 'attempts'), nextval('ended_' || :k::int);";

	return (
		hot => [
			10, q{
\set k random(1, 3)
BEGIN;
SELECT sb_increment('hot ' || :k::int, 1, 'hot');
INSERT INTO ledger VALUES ('hot', 'hot ' || :k::int, 1);
COMMIT;
}
		],
		wide => [
			10, q{
\set k random(1, 10000)
\set n random(-3, 9)
BEGIN;
SELECT sb_increment(:k::int, :n::int, 'wide');
INSERT INTO ledger VALUES ('wide', :k::int, :n::int);
COMMIT;
}
		],
		savepoints => [
			5, q{
\set a random(1, 100)
\set b random(1, 100)
\set c random(1, 10000)
BEGIN;
INSERT INTO pairs VALUES (:a::int, 'x', 2);
SAVEPOINT one;
SELECT sb_increment(ROW(:b::int, 'x'), 1, 'pairs'), sb_increment(:c::int, 1, 'wide');
SAVEPOINT two;
SELECT sb_increment(ROW(:a::int, 'x'), 100, 'pairs'), sb_increment('undone', 1, 'hot');
ROLLBACK TO two;
SELECT sb_increment(ROW(:a::int, NULL::text), 3, 'pairs');
RELEASE one;
SAVEPOINT three;
SELECT sb_increment(:c::int, 1000, 'wide');
ROLLBACK TO three;
INSERT INTO ledger VALUES
	('pairs', :a::int || ' x', 2), ('pairs', :b::int || ' x', 1), ('wide', :c::int, 1), ('pairs', :a::int || ' null', 3);
COMMIT;
}
		],
		rollback => [
			3, q{
\set k random(1, 10000)
BEGIN;
SELECT sb_increment('hot 1', 1000000, 'hot'), sb_increment(:k::int, 1000000, 'wide');
INSERT INTO ledger VALUES ('hot', 'hot 1', 1000000), ('wide', :k::int, 1000000);
ROLLBACK;
}
		],
		exceptions => [
			3, q{
\set k random(1, 10000)
SELECT count_with_exceptions(:k::int);
}
		],
		procedure => [
			2, q{
\set k random(1, 50)
CALL count_in_transactions(:k::int);
}
		],
		look => [
			3, q{
SELECT count_and_look(:client_id::int);
}
		],
		select => [
			1, q{
\set first random(1, 9000)
\set size random(1, 1000)
\set n random(-1, 5)
BEGIN;
INSERT INTO wide SELECT g, :n::int FROM generate_series(:first::int, :first::int + :size::int) AS g;
INSERT INTO ledger SELECT 'wide', g, :n::int FROM generate_series(:first::int, :first::int + :size::int) AS g;
COMMIT;
}
		],
		merged => [
			3, q{
\set k random(1, 50)
\set zeros random(1, 5)
BEGIN;
SELECT sb_increment(round(:k::int, :zeros::int), 1, 'merged'), sb_increment(:k::int + 0.5, 1, 'merged');
INSERT INTO ledger VALUES ('merged', :k::int, 1), ('merged', :k::int + 0.5, 1);
COMMIT;
}
		],
		kept => [
			3, q{
\set k random(1, 500)
BEGIN;
SELECT sb_increment('key ' || :k::int, 1, 'rare'), sb_increment(NULL::text, 1, 'rare'), sb_increment(:k::int % 100, 2, 'stuck');
INSERT INTO ledger VALUES ('rare', 'key ' || :k::int, 1), ('rare', 'null', 1), ('stuck', :k::int % 100, 2);
COMMIT;
}
		],
		once => [
			2, q{
\set k random(1, 100)
BEGIN;
SELECT sb_increment(:k::int, 1, 'once');
INSERT INTO ledger VALUES ('once', :k::int, 1);
COMMIT;
}
		],
		late => [
			2, q{
\set k random(1, 10000)
BEGIN;
INSERT INTO late VALUES (:k::int, 1), (:k::int, 2);
DELETE FROM late WHERE key = :k::int;
COMMIT;
}
		],
		async => [
			4, "\\set k random(1, $nasync)\nBEGIN; $attempt COMMIT;"
		],
		async_undone => [
			4, "\\set k random(1, $nasync)\nBEGIN; $attempt ROLLBACK;"
		]);
}

# Long scripts for psql, which goes on with the next transaction after an
# error.  A transaction that fails has no row in the ledger either.
#
# Nothing in them locks a buffer that is compared, other than "rough", more
# than counting does: calm sessions would be drawn into deadlocks.
sub rough_script
{
	my ($transactions) = @_;
	my $text = "SET application_name = 'rough';\n";
	my $ways = 16;

	foreach (1 .. $transactions)
	{
		my $k = 1 + int rand 200;
		my $l = 1 + int rand 10;
		my $m = 1 + int rand 10;
		my $n = 1 + int rand 9;
		my $many = int rand 3 ? 300 : 3000;
		my $buffer = int rand 2 ? 'rough' : 'wide';
		my $count =
		  "SELECT sb_increment($k, $n, 'rough'); INSERT INTO ledger VALUES ('rough', $k, $n);";
		my $way = int rand $ways;

		if ($way == 0)
		{
			$text .= "BEGIN; $count COMMIT;\n";
		}
		elsif ($way == 1)
		{
			# many keys, so that publishing takes time
			$text .=
			  "WITH l AS (INSERT INTO ledger SELECT '$buffer', g, $n FROM generate_series($k, $k + $many) AS g RETURNING key, n)"
			  . " INSERT INTO $buffer SELECT key::int, n FROM l;\n";
		}
		elsif ($way == 2)
		{
			$text .= "BEGIN; SELECT sb_increment($k, $n, 'rough'); SAVEPOINT s;"
			  . " SELECT sb_increment($k, 1000, 'rough'), pg_sleep(random() * 0.01); ROLLBACK TO s;"
			  . " INSERT INTO ledger VALUES ('rough', $k, $n); COMMIT;\n";
		}
		elsif ($way == 3 || $way == 4)
		{
			my $i = 1 + int rand $nasync;

			$text .=
			  "BEGIN; LOCK TABLE ledger IN ROW EXCLUSIVE MODE; SELECT nextval('begun_$i'),"
			  . " sb_async_increment($i, 1, 'attempts'), nextval('ended_$i'); "
			  . (int rand 2 ? 'COMMIT' : 'ROLLBACK') . ";\n";
		}
		elsif ($way == 5)
		{
			$text .= "SELECT sb_increment($k, 1, 'fleeting');\n";
		}
		elsif ($way == 6)
		{
			$text .= "SELECT count(*), sum(n) FROM $buffer;"
			  . " SELECT sb_count($k, 'rough'); SELECT count(*) FROM sb_keys('$buffer');"
			  . " TABLE sb_stat_buffers;\n";
		}
		elsif ($way == 7)
		{
			# the time runs out, perhaps at commit
			$text .= "SET statement_timeout = '" . (1 + int rand 20) . "ms';"
			  . " WITH l AS (INSERT INTO ledger SELECT '$buffer', g, $n FROM generate_series($k, $k + 2000) AS g RETURNING key, n)"
			  . " INSERT INTO $buffer SELECT key::int, n FROM l; RESET statement_timeout;\n";
		}
		elsif ($way == 8)
		{
			# serializable, and fails when others do the same
			$text .= "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT sum(n) FROM doors; $count"
			  . " UPDATE doors SET n = n + 1 WHERE id = $l; SELECT pg_sleep(random() * 0.02); COMMIT;\n";
		}
		elsif ($way == 9)
		{
			# fails at commit
			$text .= "BEGIN; $count INSERT INTO passed VALUES (2); COMMIT;\n";
		}
		elsif ($way == 10)
		{
			# deadlocks with others that do the same
			$text .= "BEGIN; $count UPDATE doors SET n = n + 1 WHERE id = $l;"
			  . " SELECT pg_sleep(random() * 0.02); UPDATE doors SET n = n + 1 WHERE id = $m; COMMIT;\n";
		}
		elsif ($way == 11)
		{
			# the definition changes, and does not
			my ($option, $value) = random_option();

			$text .= "SET lock_timeout = '1s'; BEGIN;"
			  . " ALTER FOREIGN TABLE rough OPTIONS (SET $option '$value');"
			  . " SELECT sb_increment($k, $n, 'rough'); ROLLBACK; RESET lock_timeout;\n";
		}
		elsif ($way == 12)
		{
			# truncated, and not
			$text .= "SET lock_timeout = '1s'; BEGIN; SELECT sb_increment($k, $n, 'rough'); "
			  . (
				int rand 2
				? "TRUNCATE rough; SELECT sb_increment($k, $n, 'rough'); ROLLBACK;"
				: "SAVEPOINT s; TRUNCATE rough; ROLLBACK TO s; INSERT INTO ledger VALUES ('rough', $k, $n); COMMIT;"
			  ) . " RESET lock_timeout;\n";
		}
		elsif ($way == 13)
		{
			$text .= (
				"SELECT sb_flush_all('$buffer');",
				"SELECT sb_flush($k, '$buffer');",
				"SELECT sb_drain('$buffer', '1s');",
				"SET statement_timeout = '20ms'; SELECT sb_drain('$buffer'); RESET statement_timeout;"
			)[ int rand 4 ] . "\n";
		}
		elsif ($way == 14)
		{
			$text .=
			  "BEGIN; COPY rough FROM STDIN;\n$k\t$n\n$l\t$n\n\\.\n"
			  . "INSERT INTO ledger VALUES ('rough', $k, $n), ('rough', $l, $n); COMMIT;\n";
		}
		else
		{
			# of either type, as it happens to be
			$text .= "BEGIN; SELECT sb_increment($k, $n, 'shifty');"
			  . " INSERT INTO ledger VALUES ('shifty', $k, $n); COMMIT;\n";
		}
	}
	return only_in_blocks($text);
}

# If a BEGIN was cancelled, what follows it would be so many transactions: the
# increment may fail, and its row in the ledger not.
sub only_in_blocks
{
	my ($text) = @_;

	$text =~ s/\bBEGIN\b([^;]*);/BEGIN$1;\n\\if :ERROR\n\\else\n/g;
	$text =~ s/\b(COMMIT|ROLLBACK);/$1;\n\\endif\n/g;
	return $text;
}

# The same for sessions that do nothing but get in the way of handlers.
sub trouble_script
{
	my ($transactions) = @_;
	my $text = "SET application_name = 'trouble'; SET statement_timeout = '3s';\n";

	foreach (1 .. $transactions)
	{
		my $way = int rand 10;
		my $patience = (10, 50, 300, 1000)[ int rand 4 ];

		if ($way < 5)
		{
			# Rows are updated in another order than handlers do, with more or
			# less patience than they have: deadlocks, and for transactions
			# that are repeatable read serialization failures.
			my ($buffer, @keys) = (
				[ 'hot', 'hot 3', 'hot 2', 'hot 1' ],
				[ 'rough', map { 1 + int rand 200 } 1 .. 6 ],
				[ 'merged', map { 1 + int rand 50 } 1 .. 6 ],
				[ 'pairs', map { 1 + int(rand 100) . ' x' } 1 .. 6 ])[ $way % 4 ]
			  ->@*;

			$text .= "BEGIN; SET LOCAL deadlock_timeout = '${patience}ms';";
			$text .=
			  " UPDATE stored SET touched = touched + 1 WHERE buffer = '$buffer' AND key = '$_';"
			  . ' SELECT pg_sleep(random() * 0.05);'
			  foreach @keys;
			$text .= (int rand 3 ? 'COMMIT' : 'ROLLBACK') . ";\n";
		}
		elsif ($way < 8)
		{
			# What one reads the other writes, so one of them must fail.
			$text .= 'BEGIN ISOLATION LEVEL SERIALIZABLE;'
			  . " SELECT sum(n) FROM stored WHERE buffer = 'pairs';"
			  . " INSERT INTO notes SELECT g, g || ' x' FROM generate_series(1, 100) AS g;"
			  . " SELECT pg_sleep(random() * 0.1); DELETE FROM notes; COMMIT;\n";
		}
		elsif ($way == 8)
		{
			my $mode =
			  ('SHARE', 'EXCLUSIVE', 'ACCESS EXCLUSIVE')[ int rand 3 ];

			$text .=
			  "BEGIN; LOCK TABLE stored IN $mode MODE; SELECT pg_sleep(random() * 0.2); COMMIT;\n";
		}
		else
		{
			$text .= (
				'CREATE INDEX IF NOT EXISTS stored_n ON stored (n);',
				'DROP INDEX IF EXISTS stored_n;',
				'ALTER TABLE stored ADD COLUMN IF NOT EXISTS extra float8 DEFAULT random();',
				'ALTER TABLE stored DROP COLUMN IF EXISTS extra;',
				'ALTER TABLE stored ALTER COLUMN touched TYPE numeric;',
				'ALTER TABLE stored ALTER COLUMN touched TYPE bigint;',
				'VACUUM FULL stored;',
				'REINDEX TABLE stored;',
				'ANALYZE stored;')[ int rand 9 ] . "\n";
		}
		$text .= "SELECT pg_sleep(random() * 0.1);\n";
	}
	return $text;
}

1;
