# What happens in the chaos test: processes are struck, and whatever buffers
# need is altered, as a draw decides.

package ChaosEvents;

use strict;
use warnings;

use ChaosActions;
use ChaosServer;
use ChaosWorld;
use Exporter 'import';

our @EXPORT = qw(cause_event);

# The buffers to which most of it happens.
my @busy = qw(hot wide pairs attempts rough merged);

# The handler of "pairs" belongs to a role that a superuser is no member of.
sub new_owner
{
	my $buffer = any(@exact_buffers, 'once', 'shifty');
	my $owner = any(@owners);

	$owner = 'repeater' if $buffer eq 'pairs' && $owner eq 'postgres';
	return try('owners changed', "ALTER FOREIGN TABLE $buffer OWNER TO $owner");
}

# A handler goes, is made anew, belongs to somebody else or may not be called;
# or there is a better one.
sub change_handler
{
	my $name = handler_sql();
	my $plain_name = $name =~ s/\(.*//r;
	my $restore = sub { try('handlers made again', handler_sql($name)) };
	my $way = int rand 5;

	return if exists $undo{$name};
	if ($way == 0)
	{
		try('handlers dropped', "DROP FUNCTION $name")
		  and undo_later($name, $restore);
	}
	elsif ($way == 1)
	{
		$restore->();
	}
	elsif ($way == 2)
	{
		my $owner = $name =~ /pairs/ ? 'handlers' : 'postgres';

		try('handlers given to strangers',
			"ALTER FUNCTION $name OWNER TO stranger")
		  and undo_later(
			$name,
			sub {
				try('handlers taken back',
					"ALTER FUNCTION $name OWNER TO $owner");
			});
	}
	elsif ($way == 3)
	{
		try('handlers forbidden', "REVOKE EXECUTE ON FUNCTION $name FROM PUBLIC")
		  and undo_later(
			$name,
			sub {
				try('handlers allowed',
					"GRANT EXECUTE ON FUNCTION $name TO PUBLIC");
			});
	}
	else
	{
		# another one that is better: it takes arrays
		return if exists $undo{wide_arrays};
		try('handlers that take arrays added',
			"CREATE FUNCTION store_wide(keys int[], counts bigint[]) RETURNS boolean
			 LANGUAGE sql AS \$\$ SELECT store('wide', keys::text[], counts) \$\$")
		  and undo_later(
			'wide_arrays',
			sub {
				try('handlers that take arrays dropped',
					'DROP FUNCTION store_wide(int[], bigint[])');
			});
	}
	return;
}

# An owner may not log in, or has other settings.
sub change_role
{
	my $role = any(@owners[ 1 .. $#owners ]);
	my $setting = any(
		"default_transaction_isolation = 'serializable'",
		"default_transaction_isolation = 'repeatable read'",
		"default_transaction_isolation = 'read committed'",
		"lock_timeout = '50ms'",
		"statement_timeout = '50ms'",
		"default_transaction_read_only = on",
		"default_transaction_deferrable = on",
		"synchronous_commit = off",
		"work_mem = '64kB'",
		"search_path = pg_catalog");

	if (rand() < 0.2)
	{
		my ($out, $in) = @{
			any(
				[ 'NOLOGIN', 'LOGIN' ],
				[ 'CONNECTION LIMIT 0', 'CONNECTION LIMIT -1' ])};

		return if exists $undo{"$role login"};
		try('roles locked out', "ALTER ROLE $role $out");
		undo_later("$role login",
			sub { try('roles let in again', "ALTER ROLE $role $in") });
	}
	else
	{
		try('settings of roles changed', "ALTER ROLE $role SET $setting");
		undo_later(
			"$role settings",
			sub {
				try('settings of roles reset', "ALTER ROLE $role RESET ALL;"
					  . ( $role eq 'repeater' ? "ALTER ROLE $role SET default_transaction_isolation = 'repeatable read'"
						: $role eq 'serializer' ? "ALTER ROLE $role SET default_transaction_isolation = 'serializable'"
						: ''));
			})
		  if $setting =~ /read_only|search_path|timeout/
		  && !exists $undo{"$role settings"};
	}

	# It is a worker's next one that has the settings.
	strike('workers terminated', 'pg_terminate_backend',
		"$is_worker AND usename = '$role'", 2);
	return;
}

# A buffer that is not compared is made, counted in, truncated or dropped.
sub change_fleeting
{
	my $way = int rand 4;

	if ($way == 0)
	{
		try('buffers made',
			"CREATE FOREIGN TABLE fleeting (key int NOT NULL, n bigint NOT NULL)
			 SERVER statbuffer OPTIONS (handler 'store_fleeting', interval '"
			  . few(5000)
			  . "ms');
			 SELECT sb_increment(g, 1, 'fleeting') FROM generate_series(1, 5000) AS g");
	}
	elsif ($way == 1)
	{
		try('buffers truncated', 'TRUNCATE fleeting');
	}
	else
	{
		try('buffers dropped', 'DROP FOREIGN TABLE fleeting');
	}
	return;
}

# A database that has counts of its own is made or dropped.
sub change_database
{
	if (try('databases made', 'CREATE DATABASE fleeting TEMPLATE template_chaos'))
	{
		$node->psql('fleeting',
			'INSERT INTO fleeting SELECT g, 1 FROM generate_series(1, 5000) AS g');
	}
	else
	{
		try('databases dropped',
			"LOAD 'statbuffer'; DROP DATABASE fleeting" . any('', ' WITH (FORCE)'));
	}
	return;
}

# Each with how often it happens, in relation to the others.
my @events = (
	[ 10, sub { strike('workers terminated', 'pg_terminate_backend', $is_worker) } ],
	[ 10, sub { strike('workers cancelled', 'pg_cancel_backend', $is_worker) } ],
	[ 1, sub { strike('workers terminated', 'pg_terminate_backend', $is_worker, 20) } ],
	[ 3, sub { strike('launchers cancelled', 'pg_cancel_backend', $is_launcher) } ],
	[ 20, sub { strike('sessions cancelled', 'pg_cancel_backend', $is_session) } ],
	[ 10, sub { strike('sessions terminated', 'pg_terminate_backend', $is_session) } ],
	[
		10,
		sub {
			my ($option, $value) = random_option();

			try('options changed',
				'ALTER FOREIGN TABLE ' . any(@busy) . " OPTIONS (SET $option '$value')");
		}
	],
	[ 5, \&new_owner ],
	[ 5, \&change_role ],
	[ 5, \&change_handler ],
	[ 4, \&change_fleeting ],
	[ 1, \&change_database ],
	[
		5,
		sub {
			try('flushes asked for', "SELECT sb_flush_all('" . any(@busy) . "')");
		}
	],
	[
		3,
		sub {
			try('flushes asked for',
				"SELECT sb_flush(g, 'wide'), sb_flush('hot ' || g % 4, 'hot')
				 FROM generate_series(1, 100) AS g");
		}
	],
	[
		3,
		sub {
			try('drains', "SELECT sb_drain('" . any(@busy) . "', '500ms')");
		}
	],
	[
		3,
		sub {
			try('drains cut off',
				"SET statement_timeout = '20ms'; SELECT sb_drain('" . any(@busy) . "')");
		}
	],
	[
		3,
		sub {
			return if exists $undo{stopped};
			try('buffers stopped', "SELECT sb_stop('rough')");
			undo_later('stopped',
				sub { try('buffers started', "SELECT sb_start('rough')") });
		}
	],
	[
		1,
		sub {
			return if exists $undo{renamed};
			try('buffers renamed', 'ALTER FOREIGN TABLE rough RENAME TO smooth')
			  and undo_later(
				'renamed',
				sub {
					try('buffers renamed',
						'ALTER FOREIGN TABLE smooth RENAME TO rough');
				},
				0.5);
		}
	],
	[
		1,
		sub {
			try('key columns altered',
				'ALTER FOREIGN TABLE shifty ALTER key TYPE ' . any('int', 'bigint'));
		}
	],
	[
		2,
		sub {
			return if exists $undo{gate};
			try('gates closed', 'BEGIN; DELETE FROM passed; DELETE FROM gate; COMMIT')
			  and undo_later('gate',
				sub { try('gates opened', 'INSERT INTO gate VALUES (1)') });
		}
	],
	[
		2,
		sub {
			return if exists $undo{mood};
			try('moods changed',
				'UPDATE mood SET failing = ' . rand(1) . ', slow = ' . rand(0.1));
			undo_later(
				'mood',
				sub {
					try('moods changed',
						'UPDATE mood SET failing = 0.05, slow = 0.01');
				});
		}
	],
	[
		1,
		sub {
			write_settings(1 + few(10));
			$node->reload;
			record('settings reloaded');
			$done{'settings reloaded'}++;
		}
	]);
my $weight = 0;
$weight += $_->[0] foreach @events;

# One of them.
sub cause_event
{
	my $draw = rand $weight;

	foreach my $event (@events)
	{
		$draw -= $event->[0];
		next if $draw > 0;
		$event->[1]->();
		$done{events}++;
		return;
	}
	return;
}

1;
